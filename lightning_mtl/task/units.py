"""The units of a regression's targets: standardized in the loss, raw everywhere else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_mtl.task.labels import MaskedTarget

Standardize = bool | Literal["running"] | tuple[float | Sequence[float], float | Sequence[float]]

# What running statistics keep of themselves in each step, as batch normalization counts it the other way round.
_MOMENTUM = 0.99


class Units(nn.Module):
    r"""The mean and standard deviation of one task's targets, between raw and standardized units.

    .. math:: \hat y = \sigma\,\mathrm{head}(z) + \mu, \qquad
              L = \ell\Bigl(\frac{\hat y - \mu}{\sigma}, \frac{y - \mu}{\sigma}\Bigr)

    What the head computes is standardized; a forward hook on it makes raw numbers of that, so that predictions,
    metrics and exports are in the targets' own units wherever the head is called. The statistics are a part of the
    model's state, in float64.

    Args:
        task: The task's name, for errors.
        declared: ``Task(standardize=...)``.

    Example:
        >>> units = Units("age", (40.0, 10.0))
        >>> units.raw(torch.tensor([-1.0, 0.5])), units.standard(torch.tensor([30.0, 45.0]))
        (tensor([30., 45.]), tensor([-1.0000,  0.5000]))
    """

    def __init__(self, task: str, declared: Standardize) -> None:
        super().__init__()
        self.task = task
        self.running = declared == "running"
        self.known = self.used = False
        self.mean, self.std = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        self._square = torch.zeros((), dtype=torch.float64)  # of running statistics: the mean of the squares
        if isinstance(declared, tuple):
            self.set(*(torch.as_tensor(value, dtype=torch.float64) for value in declared))

    def set(self, mean: Tensor, std: Tensor) -> None:
        """Take statistics over."""
        self.mean, self.std, self.known = mean, std, True

    def raw(self, prediction: Tensor) -> Tensor:
        """Standardized numbers in the targets' own units."""
        mean, std = self._like(prediction)
        return prediction * std + mean

    def standard(self, values: Tensor) -> Tensor:
        """Raw numbers, standardized."""
        mean, std = self._like(values)
        return (values - mean) / std

    def spread(self, prediction: Any, target: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - what is checked here
        """Mean and standard deviation of each single number that is predicted.

        Raises:
            TypeError: If prediction or target is no tensor of real numbers.
            ValueError: If their shapes differ.
        """
        self.check(prediction, target)
        self.used = True
        mean, std = self._like(prediction)
        return mean.expand_as(prediction), std.expand_as(prediction)

    def _like(self, values: Tensor) -> tuple[Tensor, Tensor]:
        if not self.known and not self.running:  # before its first batch, a running mean is 0
            raise RuntimeError(
                f"Task(standardize=True) of task {self.task!r} knows the targets' mean and standard deviation once a "
                "training has begun, or a checkpoint was loaded; fit first, or give standardize=(mean, std)."
            )
        # In half precision a mean far from 0 would swallow the differences: not a zero-dimensional tensor, which would
        # take the values' dtype.
        dtype = torch.promote_types(values.dtype, torch.float32)
        mean, std = (x.to(values.device, dtype) for x in (self.mean, self.std))
        return (mean.view(1), std.view(1)) if mean.ndim == 0 and values.ndim else (mean, std)

    def check(self, prediction: Any, target: Any) -> None:  # noqa: ANN401 - what is checked here
        """Refuse what has no units of its own, see :meth:`spread`."""
        target = target.target if isinstance(target, MaskedTarget) else target
        for name, value in (("prediction", prediction), ("target", target)):
            if not isinstance(value, Tensor) or not value.is_floating_point():
                found = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(
                    f"Task(standardize=...) of task {self.task!r} needs a {name} that is a tensor of real numbers, "
                    f"found {found}; leave it out for classes, and for what is no single tensor."
                )
        if prediction.shape != target.shape:
            raise ValueError(
                f"Task(standardize=...) of task {self.task!r} needs predictions of the targets' shape, found "
                f"{list(prediction.shape)} for {list(target.shape)}."
            )

    @torch.no_grad()
    def follow(self, sums: Tensor, head: nn.Module) -> None:
        """Move running statistics by a batch, and correct the head so that its raw predictions stay as they are.

        Args:
            sums: ``[3]``, float64, over all ranks: the number of labels, their sum, the sum of their squares.
            head: The task's head, whose last layer is corrected, as PopArt does (van Hasselt et al., 2016,
                arXiv:1602.07714).
        """
        count, total, squares = sums.unbind()
        mean, std, square = (x.to(sums) for x in (self.mean, self.std, self._square))
        first = not self.known
        keep = 1 - (count > 0).to(sums) * (1.0 if first else 1 - _MOMENTUM)
        count = count.clamp(min=1)
        new_mean = keep * mean + (1 - keep) * total / count
        new_square = keep * square + (1 - keep) * squares / count
        variance = new_square - new_mean.square()
        # A batch of one number, or of equal ones, says nothing of the scale.
        new_std = torch.where(variance > 1e-12 * new_square, variance.clamp(min=0).sqrt(), std)
        if not first:  # before the first batch there is no prediction to keep
            layer = final_layer(self.task, head)
            layer.weight.mul_((std / new_std).to(layer.weight))
            if layer.bias is not None:
                layer.bias.copy_(((std * layer.bias + mean - new_mean) / new_std).to(layer.bias))
        self.mean, self.std, self._square, self.known = new_mean, new_std, new_square, True

    def get_extra_state(self) -> dict[str, Any]:
        """The statistics, for a checkpoint."""
        return {"known": self.known} | {n: getattr(self, n).cpu().clone() for n in ("mean", "std", "_square")}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Go on with a checkpoint's statistics."""
        self.known = bool(state["known"])
        self.mean, self.std, self._square = (state[name].clone() for name in ("mean", "std", "_square"))


def final_layer(task: str, head: nn.Module) -> nn.Linear | _ConvNd:
    """The affine layer that a head ends with.

    Raises:
        ValueError: If it ends otherwise.
    """
    layer = head
    while isinstance(layer, nn.Sequential) and len(layer):
        layer = layer[-1]
    if isinstance(layer, nn.Linear | _ConvNd) and layer.bias is not None:
        return layer
    raise ValueError(
        f"Task(standardize='running') of task {task!r} corrects the head's last layer, an nn.Linear or a convolution "
        f"with a bias, but the head, {type(head).__name__}, does not end with one that can be seen; give "
        "standardize=(mean, std)."
    )


class Standardizers(nn.ModuleDict):
    """The units of those of a module's tasks that standardize their targets, by task.

    Args:
        declared: Each task's ``Task(standardize=...)``.
        heads: Each task's head.
    """

    def __init__(self, declared: Mapping[str, Standardize], heads: Mapping[str, nn.Module] | nn.ModuleDict) -> None:
        super().__init__()
        for task, own in declared.items():
            self.add(task, own, heads)

    def of(self, task: str) -> Units | None:
        """A task's units, if it standardizes."""
        return cast("Units", self[task]) if task in self else None

    def add(self, task: str, declared: Standardize, heads: Mapping[str, nn.Module] | nn.ModuleDict) -> None:
        """Let a task's head predict in raw units from now on, if the task standardizes.

        Raises:
            ValueError: If the head is another task's, too, or cannot be corrected as running statistics ask for.
        """
        if declared is False:
            return
        head = heads[task]
        if others := [other for other, own in heads.items() if own is head and other != task]:
            raise ValueError(
                f"Task(standardize=...) of task {task!r} changes what its head returns, and the head is that of "
                f"{others}, too; give each a head of its own."
            )
        if declared == "running":
            final_layer(task, head)
        self[task] = units = Units(task, declared)
        # Inside of what is compiled: a copy for export is made of the module in it.
        getattr(head, "_orig_mod", head).register_forward_hook(_InRawUnits(units))

    def drop(self, task: str, head: nn.Module) -> Units | None:
        """Let a task's head predict what it computes again; return the units that it had."""
        units = self.of(task)
        if units is not None:
            hooks = getattr(head, "_orig_mod", head)._forward_hooks
            for key in [key for key, hook in hooks.items() if isinstance(hook, _InRawUnits)]:
                del hooks[key]
            del self[task]
        return units

    def check_used(self, tasks: Iterable[str]) -> None:
        """Refuse a step in which tasks had losses that are not in the units which their heads learn in.

        Raises:
            ValueError: If such a loss was computed without ``task_output``.
        """
        for task in tasks:
            if (units := self.of(task)) is not None and not units.used:
                raise ValueError(
                    f"Task(standardize=...) of task {task!r} has no effect on a loss that task_losses computes by "
                    f"itself: return self.task_output({task!r}, prediction, target) there, or leave standardize out."
                )


class _InRawUnits:
    """The hook of a head: a class, for hooks are copied and pickled with their module."""

    def __init__(self, units: Units) -> None:
        self.units = units

    def __call__(self, head: nn.Module, given: Any, output: Any) -> Tensor:  # noqa: ANN401 - as torch calls it
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise TypeError(
                f"Task(standardize=...) of task {self.units.task!r} needs a head that returns a tensor of real "
                f"numbers, found {output.dtype if isinstance(output, Tensor) else type(output).__name__}."
            )
        return self.units.raw(output)


def check_standardize(declared: Any) -> Standardize:  # noqa: ANN401 - what is checked here
    """Refuse a ``Task(standardize=...)`` that says nothing; a pair may be a list, as YAML has it.

    Raises:
        ValueError: Naming what was found.
    """
    if isinstance(declared, bool) or declared == "running":
        return declared if isinstance(declared, bool) else "running"
    if isinstance(declared, tuple | list) and len(declared) == 2:
        try:
            mean, std = (torch.as_tensor(value, dtype=torch.float64) for value in declared)
        except (TypeError, ValueError):
            mean, std = torch.tensor(torch.nan), torch.tensor(torch.nan)
        if mean.isfinite().all() and std.isfinite().all() and (std > 0).all():
            return declared[0], declared[1]
    raise ValueError(
        f"Task(standardize={declared!r}) must be True, 'running', or (mean, std), finite numbers with std above 0."
    )
