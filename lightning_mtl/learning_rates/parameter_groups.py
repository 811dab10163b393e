"""Groups an optimizer's parameters by the part of the model that they belong to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mtl.learning_rates.given_rates import KEY
from lightning_mtl.task.module import Depth, TaskModule

Rate = float | Tensor


def own_parameters(module: TaskModule) -> dict[str, list[nn.Parameter]]:
    """Return each head's own parameters: those that neither the shared part nor another head has."""
    trunk = [] if module.the_trunk is None else module.the_trunk.parameters()
    shared = {*trunk, *module.shared_parameters()}
    heads = {task: list(head.parameters()) for task, head in module.the_heads.items()}
    counts = Counter(parameter for parameters in heads.values() for parameter in parameters)
    return {task: [p for p in parameters if counts[p] == 1 and p not in shared] for task, parameters in heads.items()}


def parameter_groups(
    module: TaskModule,
    lr: Rate | None,
    *,
    trunk_lr: Rate | None,
    head_lr: Mapping[str, Rate],
    weight_decay: float | None,
) -> list[dict[str, Any]]:
    """Build the groups that :meth:`~lightning_mtl.MultiTaskModule.parameter_groups` describes."""
    if unknown := head_lr.keys() - module.tasks.keys():
        raise ValueError(
            f"parameter_groups(head_lr=...) names {sorted(unknown)}, but the tasks are {list(module.tasks)}."
        )
    named = {"lr": lr, "trunk_lr": trunk_lr, **{f"head_lr[{task!r}]": rate for task, rate in head_lr.items()}}
    for name, value in {**named, "weight_decay": weight_decay}.items():
        if isinstance(value, float | int) and not (math.isfinite(value) and value >= 0):
            raise ValueError(f"parameter_groups({name}={value}) must be finite and at least 0.")
    if module.the_trunk is None:
        raise ValueError(
            f"parameter_groups() makes a group of the trunk and of each head, which {type(module).__name__} has not; "
            'give the optimizer groups of its own, [{"params": ..., "name": "head/<task>"}, ...], by which '
            "TaskLearningRate finds a task's."
        )
    trunk = list(module.the_trunk.parameters())
    heads = own_parameters(module)
    taken = {*trunk, *(parameter for parameters in heads.values() for parameter in parameters)}
    parts: list[tuple[str, Iterable[nn.Parameter], Rate | None]] = [
        ("trunk", trunk, trunk_lr),
        *((f"head/{task}", parameters, head_lr.get(task)) for task, parameters in heads.items()),
        ("rest", [parameter for parameter in module.parameters() if parameter not in taken], None),
    ]
    groups: list[dict[str, Any]] = []
    for name, parameters, own in parts:
        rate = lr if own is None else own
        for suffix, factor, members in _by_depth(list(parameters), module.depths):
            group: dict[str, Any] = {"params": members, "name": name + suffix}
            if rate is not None:
                # A tensor of its own for each group: schedulers write into it.
                group["lr"] = rate * factor if factor != 1 or isinstance(rate, Tensor) else rate
                if trunk_lr is not None or head_lr or module.depths:
                    # Schedulers overwrite "lr": configure_optimizers looks whether they have kept this.
                    group[KEY] = (float(rate * factor), own is not None or factor != 1)
            elif factor != 1:
                group["lr_factor"] = factor
            if weight_decay is not None:
                group["weight_decay"] = weight_decay
            groups.append(group)
    return groups


def _by_depth(
    parameters: list[nn.Parameter], depths: Iterable[Depth]
) -> Iterable[tuple[str, float, list[nn.Parameter]]]:
    """Divide a part: what no depth claims first, under the part's name alone; nothing empty."""
    claimed: set[nn.Parameter] = set()
    found = []
    for depth in depths:
        members = [p for p in parameters if p in depth.parameters]
        claimed.update(members)
        found.append((f"/{depth.name}", depth.factor, members))
    rest = [p for p in parameters if p not in claimed]
    return [divided for divided in [("", 1.0, rest), *found] if divided[2]]


def _named_groups(module: TaskModule, optimizer: torch.optim.Optimizer) -> dict[str, list[int]]:
    """The groups that are named for a task, where a module has no heads to find them by."""
    places: dict[str, list[int]] = {task: [] for task in module.tasks}
    for index, group in enumerate(optimizer.param_groups):
        kind, _, task = str(group.get("name", "")).partition("/")
        if kind == "head" and task in places:
            places[task].append(index)
    if bare := [task for task, found in places.items() if not found]:
        raise ValueError(
            f"The tasks {bare} have no parameter group, so that no learning rate is theirs: {type(module).__name__} "
            'has no heads. Have configure_optimizers name one for each task, {"params": ..., "name": "head/<task>"}, '
            "or leave TaskLearningRate out."
        )
    return places


def apply_lr_factors(optimizer: torch.optim.Optimizer) -> None:
    """Scale the optimizer's default learning rate in groups made without one; call it before any scheduler."""
    for group in optimizer.param_groups:
        factor = group.pop("lr_factor", None)
        if factor is not None:
            group["lr"] = group["lr"] * factor
            group[KEY] = (float(group["lr"]), True)


def groups_of_heads(module: TaskModule, optimizer: torch.optim.Optimizer) -> dict[str, list[int]]:
    """Find the indices of each head's groups in the optimizer; a head that is not in it, a frozen one, has none.

    Raises:
        ValueError: If a head shares a group with other parameters, so that its learning rate is not its own.
    """
    if module.the_trunk is None:
        return _named_groups(module, optimizer)
    owner = {parameter: task for task, parameters in own_parameters(module).items() for parameter in parameters}
    found: dict[str, list[int]] = {task: [] for task in module.tasks}
    for index, group in enumerate(optimizer.param_groups):
        owners = {owner.get(parameter) for parameter in group["params"]}
        tasks = sorted(task for task in owners if task is not None)
        if not tasks:
            continue
        name = repr(group["name"]) if "name" in group else f"number {index}"
        if len(owners) > 1:
            others = f"that of {tasks[1]!r}" if len(tasks) > 1 else "parameters that are no head's own"
            raise ValueError(
                f"The optimizer's parameter group {name} holds the head of {tasks[0]!r} together with {others}, so "
                "that no task has a learning rate of its own. Have configure_optimizers build the optimizer from "
                "self.parameter_groups(lr), or pass the module optimizer=... and leave configure_optimizers alone."
            )
        if not isinstance(group.get("lr"), float | int | Tensor):
            raise ValueError(
                f"{type(optimizer).__name__}'s parameter group {name} has the learning rate {group.get('lr')!r}, "
                "which nothing can scale; give the optimizer a number, or leave TaskLearningRate out."
            )
        found[tasks[0]].append(index)
    return found
