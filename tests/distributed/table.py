"""What every pair of processes trains: each exported weighting wherever it can measure, and the awkward batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor

from lightning_mtl import Aggregator, TaskOutput, Weighting
from lightning_mtl.weighting import DTP, MGDA, GradientNormBalance, GradNorm, UncertaintyWeighting
from tests.contract import habits
from tests.contract_rows import METHODS
from tests.distributed.data import Faces, Part, Pattern, Trunk
from tests.weightings import WeightedSum, fixed

DDP = functools.partial(DDPStrategy, process_group_backend="gloo")
FLAVOURS: dict[str, Callable[[], Strategy]] = {
    "default": DDP,
    "find_unused_parameters": functools.partial(DDP, find_unused_parameters=True),
    "static_graph": functools.partial(DDP, static_graph=True),
    "gradient_as_bucket_view": functools.partial(DDP, gradient_as_bucket_view=True),
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
    batches: int = 8  # every pattern of labels comes up in seven
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


def weighting_cases() -> dict[str, Case]:
    """Each exported weighting, over several epochs."""
    return {name: Case(make, batches=7, epochs=3) for name, make in METHODS.items()}


def place_cases() -> dict[str, Case]:
    """The places that no weighting has for its default, for one weighting of each kind."""
    found, kinds = {}, set()
    for name, make in METHODS.items():
        weighting = make()
        kind = (weighting.measures, weighting.weighs_heads)
        # What is remembered of rows is of those at the trunk.
        if weighting.measures in ("losses", "rows") or isinstance(weighting, Aggregator) or kind in kinds:
            continue
        kinds.add(kind)
        for place in PLACES:
            if place != weighting.at:
                found[f"{name} at {place}"] = Case(functools.partial(type(weighting), at=place))
    return found


def kind(case: Case) -> Hashable:
    """How the case's weighting reaches the gradients, whether chance or a metric has a part in it."""
    weighting = case.weighting()
    if weighting is None:
        return None
    by_chance = "random" in weighting.state_dict()["state"]
    return habits(weighting), by_chance, weighting.step_metric


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


@functools.cache
def cases(flavour: str) -> dict[str, Case]:
    """The flavour's table; what does not depend on the flavour of DDP, methods above all, is left to the default."""
    table = {}
    for way, make in (WAYS | OTHER_WAYS if flavour == "default" else WAYS).items():
        if way != "aggregated features":  # whose samples would lie in several batches: refused
            table[f"{way}, accumulated"] = Case(make, arguments=ACCUMULATED, batches=15)
        table[f"{way}, each task its loader"] = Case(make, "loaders")
    return weighting_cases() | table | place_cases() | _default_only() if flavour == "default" else table


def parameters() -> list[Any]:
    """Flavours and names of cases; of the weightings, all but one of each kind run with the slow tests."""
    methods, seen, found = weighting_cases(), set(), []
    for flavour in FLAVOURS:
        for name, case in cases(flavour).items():
            again = name in methods and kind(case) in seen
            # What a flavor does with a task that has no batch is tried with accumulation, too.
            again |= flavour != "default" and name.endswith("its loader")
            if name in methods:
                seen.add(kind(case))
            found.append(pytest.param(flavour, name, marks=[pytest.mark.slow] if again else []))
    return found


def _default_only() -> dict[str, Case]:
    table = {}
    for way, make in WAYS.items():
        table[f"{way}, complete"] = Case(make, "complete", validates=True)
        table[f"{way}, uncounted"] = Case(make, "uncounted")
        table[f"{way}, loss not finite"] = Case(make, "complete", module=BrokenLoss)
        table[f"{way}, gradient not finite"] = Case(make, "complete", module=BrokenGradient)
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
