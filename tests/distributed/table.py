"""What every pair of processes trains: each exported weighting wherever it can measure, and the awkward batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import lightning_mtl.weighting
from lightning_mtl import Aggregator, TaskOutput, Weighting
from lightning_mtl.weighting import DTP, MGDA, GradientNormBalance, GradNorm, UncertaintyWeighting
from tests.contract_rows import inverse_norms
from tests.distributed.data import Faces, Part, Pattern, Trunk
from tests.weightings import WeightedSum, fixed

# Of weightings that cannot do without.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "DTP": {"metric": "accuracy", "stage": "train"},
    "CRMOGM": {"weighting": MGDA()},
    "FromTorchJD": {"weighting": inverse_norms},
    # Not needed, but its own warm-up is longer than the fits here.
    "STCH": {"warmup_epochs": 1},
}
PLACES = ("trunk", "features", "last_layer")
UNLIKE = {"age": 1.0, "smile": 0.25, "pose": 3.0}


@dataclass(frozen=True)
class Case:
    """One training run."""

    weighting: Callable[[], Weighting | None]
    pattern: Pattern = "counted"
    trunk: Trunk = "plain"
    module: type[Faces] = Faces
    arguments: Mapping[str, Any] = field(default_factory=dict)
    automatic: bool = False
    """Lightning's automatic optimization; ``accumulate_grad_batches`` then goes to the Trainer."""
    batches: int = 21
    epochs: int = 1
    validates: bool = False


class Broken(torch.autograd.Function):
    """The identity, whose gradient is not a number."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Tensor:
        return outer[0] * torch.nan


class BrokenLoss(Faces):
    """A task whose loss is not a number on the rank that holds the batch's second sample, in one step of seven."""

    def _part_losses(self, part: Part) -> dict[str, TaskOutput]:
        outputs = super()._part_losses(part)
        if self.trainer.fit_loop.epoch_loop.batch_idx % 7 == 4 and self._is_mine(part):
            outputs["pose"].loss = self.broken(outputs["pose"].loss)
        return outputs

    def _is_mine(self, part: Part) -> bool:
        return self.trainer.world_size == 1 or self.trainer.global_rank == 1

    def broken(self, loss: Tensor) -> Tensor:
        return loss * torch.nan


class BrokenGradient(BrokenLoss):
    """The same with a finite loss."""

    def broken(self, loss: Tensor) -> Tensor:
        broken: Tensor = Broken.apply(loss)  # type: ignore[no-untyped-call]
        return broken


def exported() -> dict[str, type[Weighting]]:
    """Every weighting that the package exports, now and later."""
    found = {name: getattr(lightning_mtl.weighting, name) for name in lightning_mtl.weighting.__all__}
    return {name: cls for name, cls in found.items() if isinstance(cls, type) and issubclass(cls, Weighting)}


def _constructor(name: str, cls: type[Weighting], **more: Any) -> Callable[[], Weighting]:
    return lambda: cls(**(ARGUMENTS.get(name, {}) | more))


def weighting_cases() -> dict[str, Case]:
    """Each exported weighting, over several epochs."""
    return {name: Case(_constructor(name, cls), batches=7, epochs=3) for name, cls in exported().items()}


def place_cases() -> dict[str, Case]:
    """The places that no weighting has for its default, for one weighting of each kind."""
    found, kinds = {}, set()
    for name, cls in exported().items():
        default = inspect.signature(cls).parameters.get("at")
        kind = (cls.measures, cls.weighs_heads)
        if default is None or cls.measures == "losses" or issubclass(cls, Aggregator) or kind in kinds:
            continue
        kinds.add(kind)
        found.update(
            {
                f"{name} at {place}": Case(_constructor(name, cls, at=place))
                for place in PLACES
                if place != default.default
            }
        )
    return found


# One method for each way in which weights reach the gradients.
WAYS: dict[str, Callable[[], Weighting | None]] = {
    "losses": UncertaintyWeighting,
    "features": lambda: MGDA(at="features"),
    "layer": GradNorm,
    "rows": MGDA,
}
OTHER_WAYS: dict[str, Callable[[], Weighting | None]] = {
    "rows and heads": lambda: GradientNormBalance(at="trunk", importance={"age": 2.0}),
    "no weighting": lambda: None,
    "aggregator": lambda: WeightedSum(UNLIKE),
    "aggregated features": lambda: WeightedSum(UNLIKE, at="features"),
    "weights of the trunk alone": lambda: fixed(UNLIKE, "losses", weighs_heads=False),
}
ACCUMULATED = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}


def cases(flavour: str) -> dict[str, Case]:
    """The whole table; what does not depend on the flavour of DDP is left to the default one."""
    table = weighting_cases()
    ways = WAYS | OTHER_WAYS if flavour == "default" else WAYS
    for way, make in ways.items():
        table[f"{way}, accumulated"] = Case(make, arguments=ACCUMULATED, batches=41)
        table[f"{way}, each task its loader"] = Case(make, "loaders")
    return table | place_cases() | _default_only() if flavour == "default" else table


def _default_only() -> dict[str, Case]:
    table = {}
    for way, make in WAYS.items():
        table[f"{way}, complete"] = Case(make, "complete", validates=True)
        table[f"{way}, uncounted"] = Case(make, "uncounted")
        table[f"{way}, loss not finite"] = Case(make, "complete", module=BrokenLoss, batches=24)
        table[f"{way}, gradient not finite"] = Case(make, "complete", module=BrokenGradient, batches=24)
        if way != "layer":  # whose last layer would be one task's own
            table[f"{way}, a branch a task"] = Case(make, trunk="branches")
        if way != "rows":
            table[f"{way}, automatic"] = Case(make, automatic=True)
    table["now and then"] = Case(lambda: MGDA(every_n_steps=3, start_step=2))
    table["validation counts"] = Case(lambda: DTP("accuracy"), validates=True)
    for name, arguments in (("", {}), (", accumulated", {"accumulate_grad_batches": 3})):
        norm = Case(MGDA, "complete", "batch norm", arguments=arguments)
        table[f"buffers of rows{name}"] = norm
        for automatic in (False, True):
            mode = "automatic" if automatic else "manual"
            table[f"buffers, {mode}{name}"] = replace(norm, weighting=UncertaintyWeighting, automatic=automatic)
    return table
