"""Weighting is the base of all methods, and what the training step calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import nan
from typing import ClassVar, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_mtl.devices import numbers, send
from lightning_mtl.method.arguments import NamedArguments, check_common_arguments, check_tasks
from lightning_mtl.method.complaints import log_zero_gradients, negative_losses
from lightning_mtl.method.requests import Requests
from lightning_mtl.method.search_space import SearchSpace
from lightning_mtl.method.signals import Decision, Signals
from lightning_mtl.method.task_state import TaskState

Measure = Literal["losses", "norms", "gramian", "rows"]
NEGLIGIBLE = 1e-5
"""A gradient this short beside the longest counts as zero for the methods that solve for weights."""


class Weighting(NamedArguments, Requests, TaskState, ABC):
    """Turns what one step measured into one weight a task; the base of every balancing method.

    A subclass says what it ``measures`` and implements :meth:`weigh`. What it remembers between steps it declares with
    :meth:`add_state` and changes in :meth:`update`. The :class:`~lightning_mtl.MultiTaskModule` measures, calls,
    applies and logs; a weighting never touches a gradient, an optimizer, a device or a process group.

    A method that measures gradients is not asked about a task whose gradient is zero in a step, because it has no
    labels in it, is learned, or its loss does not reach where gradients are measured: the others get the weights
    that they would get without it, its state stays as it is and its weight is 0, or the mean of the others' where
    only a part of what is shared is measured. Its head, where heads are weighed, trains with the mean of the
    others' weights, which is also its weight until the next measurement. :attr:`zero_gradient_steps` counts such
    steps, and the first of each task is logged. Most methods that solve for weights count a gradient below
    :attr:`negligible` of the longest as zero, so that a vanishing gradient and a vanished one are the same to the
    other tasks. Where all gradients are zero, all weights are 1.

    Args:
        importance: ``{task: factor}``, multiplied into the weights; tasks not named keep 1.
        start_step: Optimizer steps with equal weights before the method begins.
        total: Rescale the method's weights to this sum. Methods differ in it: their weights add up to 1, to K, or to
            whatever the gradients say, and the step of plain descent is as long as they make it. With the same total
            for all, one learning rate serves to compare them. None leaves the weights as the paper has them; weights
            whose sum is not positive are left, too. Importance comes after it.
        at: Where gradients are measured, for methods that measure any: ``"trunk"`` (all shared parameters),
            ``"features"`` (the trunk's output), ``"last_layer"`` (the trunk module with weights that ran last), or
            names of modules as in ``module.named_modules()``.
        every_n_steps: Measure in one step of n and keep the weights in between.
        gradients: How gradients of parameters are measured: ``"automatic"`` takes for each layer what is cheapest, and
            ``"rows"`` keeps each task's whole gradient, to compare. Both are exact. Where parameters are sharded,
            gradients are accumulated or a method reads the gradients themselves, rows are kept anyway.

    Raises:
        ValueError: If an argument is out of its range, or at setup if ``importance`` names an unknown task.

    Example:
        >>> class Softmax(Weighting):
        ...     def weigh(self, signals):
        ...         return signals.num_tasks * signals.losses.softmax(0)
        >>> Softmax().weigh(Signals(("a", "b"), torch.tensor([1.0, 1.0]), step=0, epoch=0))
        tensor([1., 1.])
    """

    measures: ClassVar[Measure] = "losses"
    """What :meth:`weigh` needs: losses alone, gradient norms, their Gramian, or the gradients themselves."""
    reads_losses: ClassVar[bool] = True
    """Whether :meth:`weigh` reads the losses of the step it weighs, or nothing but the state. Under accumulation,
    weights that read losses are known at a step's end only: the tasks' gradients are kept until then."""
    weighs_heads: ClassVar[bool] = True
    """Whether a task's weight also scales the gradients of its own head, not those of the shared parameters alone."""
    search_space: ClassVar[SearchSpace] = {}
    """What a search may give the constructor's arguments: only those whose value changes what the method does."""
    takes_logarithms: bool = False
    """Whether the method takes the losses' logarithms; a negative loss then ends the training with an error."""
    by_task: ClassVar[tuple[str, ...]] = ()
    """Arguments, kept as attributes of the same names, that map tasks to something; unknown names are refused."""
    negligible: float = 0.0
    """A gradient that is not longer than this share of the longest counts as zero."""
    zero_gradient_steps: Tensor
    """``[K]``, the steps in which a task's gradient was zero, where the method measures norms or a Gramian."""

    def __init__(
        self,
        *,
        importance: Mapping[str, float] | None = None,
        start_step: int = 0,
        total: float | None = None,
        at: str | Sequence[str] = "trunk",
        every_n_steps: int = 1,
        gradients: Literal["automatic", "rows"] = "automatic",
    ) -> None:
        super().__init__()
        check_common_arguments(type(self).__name__, importance, start_step, total, at, every_n_steps, gradients)
        self.importance = dict(importance or {})
        self.start_step = start_step
        self.total = total
        self.at = at if isinstance(at, str) else tuple(at)
        self.every_n_steps = every_n_steps
        self.gradients = gradients
        self._newest: tuple[list[int], Tensor] | None = None
        # Of the newest step: where tasks without a gradient stand among the present ones, and all heads' weights.
        self._idle: list[int] = []
        self._heads: Tensor | None = None
        self.held_weights: Tensor
        if every_n_steps > 1:
            self.add_state("held_weights", torch.tensor(nan))
        if self.measures in ("norms", "gramian"):
            self.add_state("zero_gradient_steps", torch.tensor(0), on_cpu=True)

    @abstractmethod
    def weigh(self, signals: Signals) -> Tensor:
        """Compute one weight for each present task, ``[K]``; called once an optimizer step, before the gradients."""

    def head_weights(self) -> Tensor | None:
        """Compute, from the state, what scales the gradients of each present task's own head, ``[K]``.

        For methods that do not weigh heads by the weights themselves, and not by 1 either; None where they do.
        """
        return None

    def update(self, signals: Signals) -> None:
        """Take over what the step has shown into the state; called once an optimizer step, after :meth:`weigh`.

        With gradient accumulation the losses are means over the whole window.
        """

    def needed(self, signals: Signals, name: Literal["norms", "gramian"]) -> Tensor:
        """The measurement of this name, which a method declares to need in :attr:`measures`.

        Raises:
            ValueError: If it was not measured.
        """
        found: Tensor | None = getattr(signals, name)
        if found is None:
            raise ValueError(f"{type(self).__name__} needs the {name}, which the signals of step {signals.step} lack.")
        return found

    def check(self, pl_module: pl.LightningModule) -> None:
        """Refuse, at setup, a module that the method cannot work with."""

    # What the module calls, in this order: once at setup, then once an optimizer step.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Meet the module's tasks; refuse what cannot work."""
        others = [callback for callback in trainer.callbacks if isinstance(callback, Weighting)]  # type: ignore[attr-defined]
        named = {argument: getattr(self, argument) for argument in ("importance", *self.by_task)}
        tasks = list(check_tasks(type(self).__name__, [type(other).__name__ for other in others], pl_module, named))
        self.check(pl_module)
        if stage == "fit":  # as Lightning makes its optimizers anew; a resumed run restores the state after this
            self.reset(tasks)

    def measures_in(self, step: int) -> bool:
        """Whether the method looks at optimizer step ``step``, or lets the last weights serve."""
        return step >= self.start_step and (step - self.start_step) % self.every_n_steps == 0

    def known_beforehand(self, step: int) -> bool:
        """Whether the weights of optimizer step ``step`` depend on nothing that the step itself shows."""
        return not self.measures_in(step) or (self.measures == "losses" and not self.reads_losses)

    def current_weights(self, signals: Signals, present: Sequence[int], *, measured: bool) -> Tensor:
        """The weights to apply in this step, ``[K]`` on the device of the losses, importance included.

        Args:
            signals: The step's measurements.
            present: The present tasks as indices into :attr:`tasks`.
            measured: Whether the step measured what the method needs.
        """
        like = signals.losses
        self._idle, self._heads = [], None
        if signals.step < self.start_step:
            return self.with_importance(torch.ones_like(like), signals)
        if not measured:
            held = send(self.held_weights[numbers(present, self.held_weights.device)], like.device, like.dtype)
            known = ~held.isnan()
            return self.with_importance(torch.where(known, self._with_total(held), torch.ones_like(held)), signals)
        asked = self._asked_about(signals)
        if len(asked) == len(signals.tasks):
            weights = self._weighed(signals, present)
        else:
            weights = torch.ones_like(like)
            if asked:
                found = self._weighed(signals.cut(asked), [present[position] for position in asked])
                weights *= found.mean()
                weights.index_copy_(0, numbers(asked, weights.device), found)
                self._idle = [position for position in range(len(present)) if position not in asked]
        self._newest = (list(present), weights)
        # Elsewhere a task without a gradient may train shared parameters that are not looked at: it keeps the mean.
        idle = numbers(self._idle, weights.device, torch.long) if self._idle and self.at == "trunk" else None
        applied = weights if idle is None else weights.index_fill(0, idle, 0.0)
        applied = applied if self.total is None else self._with_total(applied)
        if idle is not None:
            heads = applied.index_copy(0, idle, (applied.sum() / len(asked)).expand(len(idle)))
            self._heads = self.with_importance(heads, signals)
        return self.with_importance(applied, signals) if self.importance else applied

    def _asked_about(self, signals: Signals) -> list[int]:
        """The tasks that the method sees, as positions in the signals: not those whose gradient counts as zero."""
        known = signals.norms if signals.host_norms is None else signals.host_norms
        sizes = known if signals.gramian is None else signals.gramian.diagonal().sqrt()
        if sizes is None or self.measures not in ("norms", "gramian"):
            return list(range(len(signals.tasks)))
        norms = sizes.tolist()
        least = self.negligible * max(norms)
        return [position for position, norm in enumerate(norms) if norm > least]

    def _weighed(self, signals: Signals, present: Sequence[int]) -> Tensor:
        """What the method says, checked."""
        with self._cut_to(present):
            weights = self.weigh(signals)
        if weights.shape != signals.losses.shape:
            raise ValueError(
                f"{type(self).__name__}.weigh returned shape {list(weights.shape)}; "
                f"{signals.num_tasks} tasks are present, so it must be [{signals.num_tasks}]."
            )
        weights, like = weights.detach(), signals.losses
        return weights.to(like) if weights.device == like.device else send(weights, like.device, like.dtype)

    def decide(
        self, signals: Signals, present: Sequence[int], *, measured: bool, rows: Sequence[Tensor] = ()
    ) -> Decision:
        """Weigh one optimizer step: what the training step asks, once.

        Args:
            signals: The step's measurements.
            present: The present tasks as indices into :attr:`tasks`.
            measured: Whether the step measured what the method needs.
            rows: The gradients, ``[K, n]`` matrices whose columns together make them up, where they were asked for.
        """
        del rows  # an aggregator's
        weights = self.current_weights(signals, present, measured=measured)
        if type(self).head_weights is not Weighting.head_weights:
            return self.with_heads(weights, signals.step, present)
        return Decision(weights, self._heads if self.weighs_heads else torch.ones_like(weights))

    def with_heads(self, weights: Tensor, step: int, present: Sequence[int]) -> Decision:
        """Add to the weights of a step what scales the gradients of the tasks' own heads in it."""
        own = None
        if step >= self.start_step:
            with self._cut_to(present):
                own = self.head_weights()
        if own is None:
            return Decision(weights, None if self.weighs_heads else torch.ones_like(weights))
        return Decision(weights, send(own.detach(), weights.device, weights.dtype))

    def _cut_to(self, present: Sequence[int]) -> AbstractContextManager[None]:
        return nullcontext() if len(present) == len(self.tasks) else self.only(present)

    def observe(self, signals: Signals, present: Sequence[int]) -> None:
        """Let the method update its state for the present tasks, after a step that was not skipped."""
        if self.takes_logarithms and bool(((losses := signals.losses_on_cpu()) < 0).any()):
            raise negative_losses(
                type(self).__name__, dict(zip(signals.tasks, losses.tolist(), strict=True)), signals.step
            )
        if self.every_n_steps > 1 and self._newest is not None:
            positions, weights = self._newest
            self.held_weights[numbers(positions, self.held_weights.device)] = weights.to(self.held_weights)
        self._newest = None
        if self._idle and "zero_gradient_steps" in self._states:
            self._count_idle([present[position] for position in self._idle], signals.step)
        if type(self).update is not Weighting.update and signals.step >= self.start_step:
            asked = self._asked_about(signals)
            if asked:
                with self.only([present[position] for position in asked]):
                    self.update(signals if len(asked) == len(signals.tasks) else signals.cut(asked))

    def _count_idle(self, positions: list[int], step: int) -> None:
        new = [self.tasks[position] for position in positions if self.zero_gradient_steps[position] == 0]
        self.zero_gradient_steps[positions] += 1
        if new:
            log_zero_gradients(type(self).__name__, new, step)

    def _with_total(self, weights: Tensor) -> Tensor:
        found = weights.nansum()
        return weights if self.total is None else torch.where(found > 0, weights * (self.total / found), weights)

    def with_importance(self, weights: Tensor, signals: Signals) -> Tensor:
        """Multiply the weights of the present tasks by their importance."""
        if not self.importance:
            return weights
        return self.scaled(weights, self.of_tasks(self.importance, 1.0, signals, weights))

    def scaled(self, weights: Tensor, importance: Tensor) -> Tensor:
        """Scale the weights of the present tasks by their importance, both ``[K]``."""
        return weights * importance


def weighting_of(trainer: pl.Trainer) -> Weighting | None:
    """The weighting among a Trainer's callbacks, if there is one."""
    return next((c for c in trainer.callbacks if isinstance(c, Weighting)), None)  # type: ignore[attr-defined]
