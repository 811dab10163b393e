"""The update acts at the trunk's outputs here, so that the trunk is passed once whatever the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mtl.gradients.feature_measurement import FeatureMeasurement, as_output
from lightning_mtl.gradients.graph import Above, above_split, check_repeatable
from lightning_mtl.gradients.micro_batch import surrogate, unscaled
from lightning_mtl.gradients.rows import add_gradients, by_parameter, weighed_sum, weighted_sums
from lightning_mtl.gradients.torch_internals import parameter_hooks_off


class FeatureGradients(FeatureMeasurement):
    r"""Measures each loss's gradient at the trunk's outputs z, and sends their weighted sum on into the trunk.

    .. math:: c_k = \partial L_k / \partial z, \qquad
              \nabla_\theta \sum_k w_k L_k = (\partial z / \partial \theta)^\top \sum_k w_k c_k

    The equation holds where every path from a loss to the trunk runs through z. Then the heads are passed once and the
    trunk once: the short way. It does not hold where a loss uses something from inside the trunk, where weights are
    tied or where the trunk reads its own output. There, and where heads share a decoder or write in place, the update
    is an ordinary backward pass of the weighted losses: the general way. Which way is right is found out in every step.
    """

    def surrogate_loss(
        self, weights: Tensor, head_weights: Tensor | None = None, directions: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Build the loss whose one backward pass gives shared parameters Σ w_k g_k, and all others Σ v_k g_k.

        Args:
            weights: ``[K]``, w.
            head_weights: ``[K]``, v; None for w.
            directions: What the trunk's outputs get instead of Σ w_k c_k, one ``[n]`` tensor for each that is read.

        Raises:
            ValueError: If there are directions, and a way to shared parameters runs past the trunk's outputs.
        """
        if self.short:
            loss = self._known(weights, head_weights, directions)
        elif directions is None and head_weights is None:
            loss = self.batch.weighted_sum(weights)
        else:
            loss = self._general(weights, weights if head_weights is None else head_weights, directions)
        return self.batch.with_penalty(loss)

    def _at_outputs(self, weights: Tensor, directions: Sequence[Tensor] | None) -> list[Tensor]:
        """What every output that is read gets: Σ w_k c_k, or the directions."""
        if directions is None or not self.read:  # a rank whose batch is empty has no outputs
            return [self._combined(i, weights) for i in range(len(self.read))]
        return [
            as_output(torch.view_as_complex(direction.view(-1, 2)) if output.z.is_complex() else direction, output.z)
            for output, direction in zip(self.read, directions, strict=True)
        ]

    def _combined(self, i: int, weights: Tensor) -> Tensor:
        """Compute Σ w_k c_k for one output, from the stacked rows where measuring has made them."""
        z = self.read[i].z
        if self._rows:
            return as_output(weighed_sum(weights, self._rows[i]), z)
        total: Tensor | None = None
        wide = torch.promote_types(z.dtype, torch.float32)  # half precision would round the weights
        for own, weight in zip(self._cotangents, weights.to(z.device, wide).unbind(), strict=True):
            if (cotangent := own[i]) is not None:
                total = cotangent.to(wide) * weight if total is None else total.addcmul_(cotangent, weight)
        return torch.zeros_like(z) if total is None else total.to(z.dtype)

    def _known(self, weights: Tensor, head_weights: Tensor | None, directions: Sequence[Tensor] | None) -> Tensor:
        """The short way's loss: everything is known down to the trunk's outputs, and autograd goes on from there."""
        v = weights if head_weights is None else head_weights
        tied: list[dict[Tensor, Tensor]] = []
        mended: dict[Tensor, Tensor] = {}
        if head_weights is not None:
            shared, others = self._parameters()
            # What a head does with a shared parameter is weighed as shared,
            tied = [{p: own.pop(p) for p in set(shared).intersection(own)} for own in self._own]
            # and what lies below the split without being shared, as heads are.
            if any(p not in self._reached_above for p in others):
                below = {leaf for one in self._below_outputs() for leaf in one.leaves}
                mended = self._mended([p for p in others if p in below], self._at_outputs(weights, directions), v)
        # One entry a parameter, in an order that does not depend on which task came first.
        parameters = list(dict.fromkeys(p for own in (*self._own, *tied, mended) for p in own))
        # A graph that is the same on all ranks has every output in it.
        read = {output.key for output in self.read}
        unread = [o for o in self.batch.split.outputs if self.batch.ranks.size > 1 and o.key not in read]

        def gradients(scaled: Tensor) -> list[Tensor]:
            outer = unscaled(scaled, self.batch.scale)
            if directions is None:
                down = self._at_outputs(weights * outer, None)
            else:
                down = [direction * outer for direction in self._at_outputs(weights, directions)]
            above = weighted_sums(self._own, (v * outer).unbind())
            if tied:
                add_gradients(above, weighted_sums(tied, (weights * outer).unbind()))
            add_gradients(above, weighted_sums([mended], [outer]))
            return [*down, *(torch.zeros_like(output.z) for output in unread), *(above[p] for p in parameters)]

        inputs = [*(output.z for output in (*self.read, *unread)), *parameters]
        return surrogate((self.losses * weights).sum(), inputs, gradients)

    def _general(self, weights: Tensor, v: Tensor, directions: Sequence[Tensor] | None) -> Tensor:
        """The loss where trunk and heads have weights of their own, and paths are not known to be separate."""
        below = self._below_outputs()
        nested = any(one.readers for one in below)
        shared, others = self._parameters()
        clean = self.batch.split.clean
        leaves = {leaf for one in below for leaf in one.leaves}
        separate = self._reached_above.isdisjoint(shared) and self._reached_above.isdisjoint(leaves)
        if directions is not None and (nested or not separate):
            raise ValueError(
                "A loss reaches shared parameters by a way that does not run through the trunk's output alone, and the "
                "direction that a method without weights gives has no meaning on that way. Measure at='trunk'."
            )
        # Where the paths cross, weights of their own for trunk and heads cannot be told apart at the outputs.
        if directions is None and (not clean or nested or not separate):
            return self._by_parameters(weights, v)
        wanted = self._at_outputs(weights, directions)
        # Parameters that are not shared may lie below the split, too, as the parts of a trunk that serve one task.
        mended = self._mended([p for p in others if p in leaves], wanted, v)
        # The losses weighed by v bring Σ v_k c_k to each output by themselves; only the difference is sent in.
        corrections = [d - self._combined(i, v) for i, d in enumerate(wanted)]
        targets = [output.z for output in self.read]
        if not clean:  # nothing can be sent into an output that was written into
            targets = []
            edges, parameters = [output.below for output in self.read], [*shared, *others]
            with parameter_hooks_off(parameters):
                got = torch.autograd.grad(edges, parameters, corrections, retain_graph=True, allow_unused=True)
            add_gradients(mended, by_parameter(parameters, got))
        inputs = [*targets, *mended]

        def gradients(scaled: Tensor) -> list[Tensor]:
            outer = unscaled(scaled, self.batch.scale)
            return [d * outer for d in ([*corrections, *mended.values()] if targets else mended.values())]

        # The heads' weights reach the trunk, too. What is wrong there is mended where it enters.
        return self.batch.weighted_sum(v) + surrogate(self.losses.new_zeros(()), inputs, gradients)

    def _below_outputs(self) -> list[Above]:
        """What each output that is read depends on: leaves, and earlier outputs where the trunk reads its own."""
        return [above_split(output.z, self.batch.split.stops) for output in self.read]

    def _mended(self, others: Sequence[Tensor], wanted: Sequence[Tensor], v: Tensor) -> dict[Tensor, Tensor]:
        """What these parameters lack where the outputs get what the shared parameters want; the scaler's factor in."""
        if not others or not self.read:
            return {}
        lacking = [self._combined(i, v) - d for i, d in enumerate(wanted)]
        with parameter_hooks_off(others):
            edges = [output.below for output in self.read]
            got = torch.autograd.grad(edges, list(others), lacking, retain_graph=True, allow_unused=True)
        return by_parameter(others, got)

    def _by_parameters(self, weights: Tensor, v: Tensor) -> Tensor:
        """The loss where a path to the trunk runs past its outputs: one pass for shared parameters, one for others."""
        if self.batch.unseen:
            check_repeatable([loss for loss in self.batch.losses if loss.requires_grad])
        known: dict[Tensor, Tensor] = {}
        for group, factors in zip(self._parameters(), (weights, v), strict=True):
            loss = self.batch.weighted_sum(factors)
            # Shared parameters are differentiated from the losses under w, all others from those under v.
            if group and loss.requires_grad:
                with parameter_hooks_off(group):
                    got = torch.autograd.grad(loss, group, retain_graph=True, allow_unused=True)
                known.update(by_parameter(group, got))
        value = (self.losses * weights).sum()
        return surrogate(value, list(known), lambda outer: [gradient * outer for gradient in known.values()])
