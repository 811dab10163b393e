"""The plan of a freezing schedule: which parts of a model are unfrozen in which epoch, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_mtl.module import MultiTaskModule
from lightning_mtl.task.module import Depth


@dataclass(frozen=True)
class UnfreezingPart:
    """Holds modules that are unfrozen together.

    Attributes:
        epoch: The first epoch that trains it.
        label: The modules' names, for messages, parameter groups and checkpoints.
        modules: The modules.
        parameters: Their parameters, but for those of earlier stages and those that were frozen before.
    """

    epoch: int
    label: str
    modules: list[nn.Module]
    parameters: list[nn.Parameter]


def check_schedule(schedule: Mapping[int, str | Sequence[str]]) -> dict[int, tuple[str, ...]]:
    """Sort a schedule by its epochs, and bring its names into tuples.

    Raises:
        ValueError: If it is empty, or an epoch is negative or no integer.

    Example:
        >>> check_schedule({2: ["trunk.0"], 0: "trunk.2"})
        {0: ('trunk.2',), 2: ('trunk.0',)}
    """
    if not schedule or not all(schedule.values()):
        raise ValueError(f"GradualUnfreezing(schedule={dict(schedule)}) must name modules: {{epoch: names}}.")
    for epoch in schedule:
        if type(epoch) is not int or epoch < 0:
            raise ValueError(f"GradualUnfreezing(schedule=...) has the epoch {epoch!r}; use integers from 0 on.")
    ordered = sorted(schedule.items())
    return {epoch: (names,) if isinstance(names, str) else tuple(names) for epoch, names in ordered}


def by_epoch(module: MultiTaskModule, schedule: Mapping[int, Sequence[str]]) -> list[UnfreezingPart]:
    """Return the parts that a schedule unfreezes.

    Raises:
        ValueError: If a name is unknown, or nothing is left to unfreeze.
    """
    return _stages(module, [(epoch, tuple(names)) for epoch, names in schedule.items()])


def from_the_top(module: MultiTaskModule, layers: str, every_n_epochs: int) -> list[UnfreezingPart]:
    """Return one part for each child of ``layers``, from the last one to the first, then the rest of the trunk.

    Raises:
        ValueError: If ``layers`` is unknown or has nothing to unfreeze.
    """
    modules = dict(module.named_modules())
    if layers not in modules:
        raise _unknown([layers], modules)
    names = [f"{layers}.{name}" for name, child in modules[layers].named_children() if list(_trainable([child]))]
    ordered = list(reversed(names))
    claimed = set(_trainable([modules[name] for name in ordered]))
    if any(parameter not in claimed for parameter in _trainable([module.trunk])):
        ordered.append("trunk")
    if not ordered:
        raise ValueError(
            f"GradualUnfreezing found no parameter to unfreeze in {layers!r}: all are frozen, or there are none. "
            "Name the module whose children are unfrozen one by one, such as layers='trunk.encoder.layer'."
        )
    return _stages(module, [(every_n_epochs * (i + 1), (name,)) for i, name in enumerate(ordered)])


def _stages(module: MultiTaskModule, asked: Iterable[tuple[int, tuple[str, ...]]]) -> list[UnfreezingPart]:
    modules = dict(module.named_modules())
    claimed: set[nn.Parameter] = set()
    found = []
    for epoch, names in asked:
        if unknown := [name for name in names if name not in modules]:
            raise _unknown(unknown, modules)
        parts = [modules[name] for name in names]
        parameters = [p for p in dict.fromkeys(_trainable(parts)) if p not in claimed]
        if not parameters:
            raise ValueError(
                f"GradualUnfreezing has nothing to unfreeze in {list(names)} at epoch {epoch}: there is no parameter "
                "that could be trained before, or all of them are unfrozen earlier. Leave the entry out."
            )
        claimed.update(parameters)
        found.append(UnfreezingPart(epoch, ",".join(name.removeprefix("trunk.") for name in names), parts, parameters))
    return found


def _trainable(modules: Iterable[nn.Module]) -> Iterable[nn.Parameter]:
    return (p for module in modules for p in module.parameters() if p.requires_grad)


def _unknown(names: Sequence[str], modules: Mapping[str, nn.Module]) -> ValueError:
    choices = [name for name, module in modules.items() if name and any(True for _ in module.parameters())]
    return ValueError(f"GradualUnfreezing names {list(names)}, which the module does not have; it has {choices}.")


def check_place(stages: Sequence[UnfreezingPart], module: MultiTaskModule) -> None:
    """Refuse a weighting that measures at modules which are still frozen while others train.

    Raises:
        ValueError: Naming the weighting's ``at`` and the part that is unfrozen first.
    """
    weighting = module.weighting()
    if weighting is None or weighting.measures == "losses" or weighting.at in ("trunk", "features", "last_layer"):
        return
    names = (weighting.at,) if isinstance(weighting.at, str) else weighting.at
    modules = dict(module.named_modules())
    measured = {p for name in names if name in modules for p in modules[name].parameters()}
    shared = set(module.shared_parameters())
    first = next((stage for stage in stages if shared.intersection(stage.parameters)), None)
    if first is not None and measured and not measured.intersection(first.parameters):
        raise ValueError(
            f"{type(weighting).__name__}(at={weighting.at!r}) measures gradients of a part that is still frozen when "
            f"{first.label!r} is unfrozen; measure at 'last_layer', 'features' or 'trunk', which follow what trains, "
            "or unfreeze this part first."
        )


def check_groups(groups: Sequence[Mapping[str, Any]], depths: Sequence[Depth], *, fresh: bool) -> None:
    """Refuse an optimizer in which depths share a group, or whose scheduler has undone their learning rates.

    Args:
        groups: The optimizer's.
        depths: The parts with learning rates of their own.
        fresh: Whether the learning rates are those that training begins with.

    Raises:
        ValueError: Saying how to build the optimizer.
    """
    rates: list[tuple[Depth, float]] = []
    for group in groups:
        members = set(group["params"])
        touched = [depth for depth in depths if members & depth.parameters]
        if touched and not members <= touched[0].parameters:
            raise ValueError(
                f"A parameter group of the optimizer holds {touched[0].name!r} together with other parameters, so that "
                "it has no learning rate of its own. Have configure_optimizers build the optimizer from "
                "self.parameter_groups(lr), or pass the module optimizer=... and leave configure_optimizers alone."
            )
        if "lr_factor" in group:
            raise ValueError(
                "The learning rates per depth are multiples of a learning rate that self.parameter_groups() was not "
                "told; call self.parameter_groups(lr) in configure_optimizers."
            )
        rates += [(depth, float(group.get("initial_lr", group["lr"]))) for depth in touched]
    for depth, rate in rates[1:] if fresh else ():
        first, first_rate = rates[0]
        if depth.factor != first.factor and math.isclose(rate, first_rate):
            raise ValueError(
                f"{depth.name!r} and {first.name!r} begin with the same learning rate, {rate}, and were given the "
                f"factors {depth.factor} and {first.factor}. A scheduler that sets the learning rates itself, as "
                "OneCycleLR does, needs one for each group: max_lr=[...]."
            )
