"""Learning rates given to parts of a model, held against schedulers that set rates of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.callbacks import LearningRateFinder, StochasticWeightAveraging
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

KEY = "given_lr"  # of a parameter group: its rate, and whether that is its part's own


class Part(NamedTuple):
    """A parameter group with the learning rate that it was given; ``own`` if that is not the model's."""

    name: str
    rate: float
    own: bool


def take_given_rates(optimizer: Optimizer) -> list[Part]:
    """Read the rates that :meth:`~lightning_mtl.MultiTaskModule.parameter_groups` noted, and take the notes away.

    Returns:
        The optimizer's groups in order; nothing if none was given a rate of its own.
    """
    default = float(optimizer.defaults.get("lr", math.nan))
    noted = [group.pop(KEY, (default, False)) for group in optimizer.param_groups]
    names = [group.get("name", f"number {index}") for index, group in enumerate(optimizer.param_groups)]
    parts = [Part(name, rate, own) for name, (rate, own) in zip(names, noted, strict=True)]
    return parts if any(part.own for part in parts) else []


def _of_groups(key: str) -> Callable[[Any], list[float]]:
    return lambda scheduler: [group[key] for group in scheduler.optimizer.param_groups]


# What a scheduler of torch sets in place of a group's rate, where its argument is one number for all groups.
_TARGETS: tuple[tuple[type, str, Callable[[Any], Sequence[float]]], ...] = (
    (schedulers.OneCycleLR, "max_lr", _of_groups("max_lr")),
    (schedulers.CyclicLR, "base_lr", lambda scheduler: scheduler.base_lrs),
    (schedulers.CyclicLR, "max_lr", lambda scheduler: scheduler.max_lrs),
    (SWALR, "swa_lr", _of_groups("swa_lr")),
)
# What a scheduler does not go below: a group whose rate is lower rises to it, or is not scheduled at all.
_FLOORS: tuple[tuple[type, str, Callable[[Any], Sequence[float]]], ...] = (
    (schedulers.ReduceLROnPlateau, "min_lr", lambda scheduler: scheduler.min_lrs),
    (schedulers.CosineAnnealingLR, "eta_min", lambda scheduler: [scheduler.eta_min]),
    (schedulers.CosineAnnealingWarmRestarts, "eta_min", lambda scheduler: [scheduler.eta_min]),
)


def check_given_rates(parts: Sequence[Part], scheduled: Iterable[Any], callbacks: Iterable[pl.Callback]) -> None:
    """Refuse schedulers, and callbacks that schedule, which would overwrite the rates that parts were given.

    A scheduler that multiplies each group's rate, and one that was given a list, are left alone; so is one of the
    user's own, unless it has replaced the groups' ``initial_lr`` by one number.

    Args:
        parts: What :func:`take_given_rates` returned.
        scheduled: The optimizer's schedulers.
        callbacks: The Trainer's.

    Raises:
        ValueError: Naming the argument, the parts and the list that keeps their rates in proportion.
    """
    if len({part.rate for part in parts}) < 2:
        return
    found = list(_unchained(scheduled))
    for scheduler in found:
        for kinds, check in ((_TARGETS, _check_target), (_FLOORS, _check_floor)):
            for kind, argument, read in kinds:
                if isinstance(scheduler, kind):
                    check(type(scheduler).__name__, argument, [float(value) for value in read(scheduler)], parts)
    for scheduler in (one for one in found if isinstance(one, schedulers.LRScheduler)):
        begins = [float(group.get("initial_lr", math.nan)) for group in scheduler.optimizer.param_groups]
        if not math.isnan(sum(begins)):
            _check_target(type(scheduler).__name__, "initial_lr", begins, parts)
    for callback in callbacks:
        if isinstance(callback, LearningRateFinder):
            raise ValueError(
                f"Lightning's learning rate finder sets one rate for all parameter groups, and {_own(parts)} were "
                "given rates of their own. Look for a rate without trunk_lr, head_lr and lr_decay, and give them as "
                "multiples of what it finds."
            )
        if isinstance(callback, StochasticWeightAveraging):
            values = callback._swa_lrs if isinstance(callback._swa_lrs, list) else [callback._swa_lrs]
            _check_target("StochasticWeightAveraging", "swa_lrs", values, parts)


def _unchained(scheduled: Iterable[Any]) -> Iterable[Any]:
    for scheduler in scheduled:
        inner = getattr(scheduler, "_schedulers", None)
        yield from [scheduler] if inner is None else _unchained(inner)


def _check_target(name: str, argument: str, values: Sequence[float], parts: Sequence[Part]) -> None:
    """Refuse one number for all groups: a list, or a rate of 0 in the midst of a warmup, is the user's choice."""
    if len(set(values)) > 1 or values[0] == 0:
        return
    raise ValueError(
        f"{name} sets one learning rate, {argument}={values[0]:g}, for all parameter groups, and {_own(parts)} were "
        f"given rates of their own. Give it one for each group: {argument}={_in_proportion(values[0], parts)}, for "
        f"{[part.name for part in parts]} in this order."
    )


def _check_floor(name: str, argument: str, values: Sequence[float], parts: Sequence[Part]) -> None:
    if len(set(values)) > 1:
        return
    floor, lowest = values[0], min(parts, key=lambda part: part.rate)
    if floor <= lowest.rate or math.isclose(floor, lowest.rate):
        return
    way_out = f"for each group its own: {argument}={_in_proportion(floor, parts)}, for {[part.name for part in parts]}"
    if argument == "eta_min":
        way_out = (
            f"{argument} of at most {lowest.rate:g}, or a factor for all groups, LambdaLR(optimizer, factor_of_epoch), "
            "in its place"
        )
    raise ValueError(
        f"{name}({argument}={floor:g}) lies above the learning rate that {lowest.name!r} was "
        f"given, {lowest.rate:g}, which would not fall to it. Give {way_out}."
    )


def _own(parts: Sequence[Part]) -> str:
    return ", ".join(f"{part.name!r} ({part.rate:g})" for part in parts if part.own)


def _in_proportion(value: float, parts: Sequence[Part]) -> str:
    """One number for each group; ``value`` is that of the groups without a rate of their own."""
    others = [part.rate for part in parts if not part.own and part.rate > 0]
    reference = max(others) if others else max(part.rate for part in parts)
    return f"[{', '.join(f'{value * part.rate / reference:.6g}' for part in parts)}]"
