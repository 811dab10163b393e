"""What a module refuses, at construction and before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from lightning_mtl.task import Task

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from lightning_mtl.module import MultiTaskModule

REFUSED_STRATEGIES = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)


def check_arguments(
    trunk: Any,  # noqa: ANN401 - what is checked here
    heads: Any,  # noqa: ANN401
    tasks: Any,  # noqa: ANN401
    accumulate_grad_batches: int,
    gradient_clip_val: float | None,
    gradient_clip_algorithm: str,
) -> None:
    """Check the arguments of :class:`~lightning_mtl.MultiTaskModule`."""
    if not isinstance(trunk, nn.Module):
        raise TypeError(f"trunk must be a torch.nn.Module, found {type(trunk).__name__}.")
    for name, mapping, kind in (("heads", heads, nn.Module), ("tasks", tasks, Task)):
        if not isinstance(mapping, Mapping | nn.ModuleDict) or not len(mapping):
            raise TypeError(
                f"{name} must be a mapping {{task: {kind.__name__}}} with an entry or more, found {mapping!r}."
            )
        for task, value in mapping.items():
            if not isinstance(value, kind):
                raise TypeError(f"{name}[{task!r}] must be a {kind.__name__}, found {type(value).__name__}.")
    for task in tasks:
        _check_task_name(task)
    _check_names_match(heads, tasks)
    _check_step_arguments(accumulate_grad_batches, gradient_clip_val, gradient_clip_algorithm)


def _check_names_match(heads: Mapping[str, nn.Module], tasks: Mapping[str, Task]) -> None:
    if missing := [task for task in tasks if task not in heads]:
        raise ValueError(f"The tasks {missing} have no head; the heads are {list(heads)}. Name both alike.")
    if extra := [task for task in heads if task not in tasks]:
        raise ValueError(f"The heads {extra} have no task; the tasks are {list(tasks)}. Name both alike.")


def _check_step_arguments(accumulate_grad_batches: object, clip_val: float | None, clip_algorithm: str) -> None:
    if isinstance(accumulate_grad_batches, bool) or not isinstance(accumulate_grad_batches, int):
        raise TypeError(f"accumulate_grad_batches must be an int, found {accumulate_grad_batches!r}.")
    if accumulate_grad_batches < 1:
        raise ValueError(f"accumulate_grad_batches={accumulate_grad_batches} must be at least 1.")
    if clip_val is not None and not clip_val > 0:
        raise ValueError(f"gradient_clip_val={clip_val} must be above 0; leave it None for no clipping.")
    if clip_algorithm not in ("norm", "value"):
        raise ValueError(f"gradient_clip_algorithm={clip_algorithm!r} must be 'norm' or 'value'.")


def _check_task_name(task: object) -> None:
    """Task names become module names, so that what ``nn.ModuleDict`` cannot hold is refused."""
    rule = "Task names become names of modules: a non-empty string without dots that is no attribute of nn.ModuleDict"
    if not isinstance(task, str) or not task or "." in task:
        raise ValueError(f"{task!r} cannot name a task. {rule}.")
    if hasattr(nn.ModuleDict(), task):
        raise ValueError(f"{task!r} cannot name a task. {rule}, as {task!r} is; {task + '_task'!r} would do.")


def check_trainer(module: MultiTaskModule, trainer: pl.Trainer) -> None:
    """Refuse, before training begins, what the module and the Trainer cannot do together."""
    weighting = module.weighting()
    if module.automatic_optimization:
        for name, unset in (("accumulate_grad_batches", 1), ("gradient_clip_val", None)):
            if getattr(module, name) != unset:
                raise ValueError(
                    f"{name}={getattr(module, name)} is the module's for manual optimization; with "
                    f"automatic_optimization = True give it to the Trainer: Trainer({name}=...)."
                )
        if weighting is not None and weighting.measures != "losses" and weighting.at == "trunk":
            raise ValueError(
                f"{type(weighting).__name__}(at='trunk') writes gradients itself, which automatic optimization rules "
                "out; leave automatic_optimization False, or measure at 'features' or 'last_layer'."
            )
    if isinstance(trainer.strategy, REFUSED_STRATEGIES):
        raise ValueError(
            f"{type(trainer.strategy).__name__} keeps gradients where no weighting can reach them; use strategy='ddp', "
            "or FSDP2: ModelParallelStrategy() with fully_shard(...) in configure_model."
        )
