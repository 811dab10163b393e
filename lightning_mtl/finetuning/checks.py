"""What a freezing schedule refuses: weightings that measure at what is frozen, optimizers that cannot follow."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_mtl.finetuning.plan import Stage
from lightning_mtl.module import MultiTaskModule
from lightning_mtl.task.module import Depth


def check_place(stages: Sequence[Stage], module: MultiTaskModule) -> None:
    """Refuse a weighting that measures at modules which are still frozen while others train.

    Raises:
        ValueError: Naming the weighting's ``at`` and what thaws first.
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
            f"{first.label!r} thaws; measure at 'last_layer', 'features' or 'trunk', which follow what trains, or thaw "
            "this part first."
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
