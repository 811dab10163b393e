"""Adding a task to a trained model, and dropping one."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from lightning.pytorch.trainer.states import TrainerStatus
from torch import nn

from lightning_mtl.module import MultiTaskModule, check_parts
from lightning_mtl.task import Task
from lightning_mtl.task.names import check_task_names
from lightning_mtl.training.checks import check_arguments
from lightning_mtl.training.logging import Recorder
from lightning_mtl.training.step import Optimization

METRIC_STAGES = ("train", "val", "test")


def add_task(module: MultiTaskModule, name: str, head: nn.Module, task: Task) -> None:
    """Give a model, trained or not, one more task; its trunk and other heads stay as they are.

    The module is changed in place, between fits. What was written before goes on as follows:

    - The next ``fit`` begins a training, without ``ckpt_path``: an optimizer over all parameters, and a weighting that
      meets K + 1 tasks with fresh state. A checkpoint of the model with K tasks cannot be resumed with K + 1: neither
      the optimizer nor the weighting remembers anything of the new task. Its weights are what counts: load them first
      (``load_from_checkpoint``), then add the task.
    - A checkpoint of the new model is loaded into a module that was built with K + 1 tasks, or had the task added:
      ``module.load_state_dict(torch.load(path)["state_dict"])``.

    Args:
        module: The model.
        name: The new task's name.
        head: Its head, called with the trunk's output.
        task: Its loss, metrics and baseline.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the name is taken or cannot name a module, or if the trunk has an output for each task, which the
            new one would lack.
        RuntimeError: In the middle of a fit.

    Example:
        >>> from torch.nn.functional import l1_loss
        >>> model = MultiTaskModule(nn.Linear(4, 8), {"age": nn.Linear(8, 1)}, {"age": Task(l1_loss)})
        >>> add_task(model, "height", nn.Linear(8, 1), Task(l1_loss))
        >>> list(model.tasks), list(model.heads)
        (['age', 'height'], ['age', 'height'])
    """
    _check_idle("add_task", module)
    if name in module.tasks:
        raise ValueError(f"The module has a task {name!r} already; its tasks are {list(module.tasks)}.")
    check_task_names([*module.tasks, name])
    _check_trunk(module, f"would have none for {name!r}")
    check_arguments(module.trunk, {name: head}, {name: task})
    module.tasks[name] = task
    module.heads[name] = head
    module.target_units.add(name, task.standardize, module.heads)
    if isinstance(task.loss, nn.Module):
        cast("nn.ModuleDict", module.loss_modules)[name] = task.loss
    if task.metrics is not None:
        for stage in METRIC_STAGES:
            getattr(module, f"{stage}_task_metrics")[name] = task.metric_collection()
    if module.learned_tasks is not None:
        module.learned_tasks = module.learned_tasks | {name}
    _begin_anew(module)


def drop_task(module: MultiTaskModule, name: str) -> tuple[nn.Module, Task]:
    """Take a task out of a model; the trunk and the other heads stay as they are.

    The module is changed in place, between fits; see :func:`add_task` for what that means for checkpoints.

    Args:
        module: The model.
        name: The task's name.

    Returns:
        The task's head and the task: what :func:`add_task` would put back.

    Raises:
        ValueError: If there is no such task, if it is the last one, or if the trunk has an output for each task.
        RuntimeError: In the middle of a fit.

    Example:
        >>> from torch.nn.functional import l1_loss
        >>> heads = {"age": nn.Linear(8, 1), "height": nn.Linear(8, 1)}
        >>> model = MultiTaskModule(nn.Linear(4, 8), heads, {task: Task(l1_loss) for task in heads})
        >>> head, task = drop_task(model, "age")
        >>> list(model.tasks)
        ['height']
    """
    _check_idle("drop_task", module)
    if name not in module.tasks:
        raise ValueError(f"The module has no task {name!r}; its tasks are {list(module.tasks)}.")
    if len(module.tasks) == 1:
        raise ValueError(f"{name!r} is the module's only task; add another one before it is dropped.")
    check_task_names([*module.tasks, name])
    _check_trunk(module, f"would keep that of {name!r}")
    task, head = module.tasks.pop(name), module.heads[name]
    del module.heads[name]
    module._head_lr.pop(name, None)
    if (units := module.target_units.drop(name, head)) is not None and units.known and not units.running:
        task = replace(task, standardize=(units.mean.tolist(), units.std.tolist()))  # the head goes on in these units
    for stored in (module.loss_modules, *(getattr(module, f"{stage}_task_metrics") for stage in METRIC_STAGES)):
        if name in stored:
            del stored[name]
    if module.learned_tasks is not None:
        module.learned_tasks = module.learned_tasks - {name}
    _begin_anew(module)
    return head, task


def _check_idle(what: str, module: MultiTaskModule) -> None:
    check_parts(module, what)
    trainer = module._trainer
    if trainer is not None and trainer.state.status == TrainerStatus.RUNNING:
        raise RuntimeError(
            f"{what} was called while a Trainer runs the module, whose optimizer and weighting were made for "
            f"{list(module.tasks)}; call it before, or after, and fit again."
        )


def _check_trunk(module: MultiTaskModule, consequence: str) -> None:
    parts = [module.trunk] if hasattr(module.trunk, "tasks") else module.trunk_parts.per_task
    if parts:
        raise ValueError(
            f"The trunk, {type(parts[0]).__name__}, has an output for each task and {consequence}. Build a module "
            "with a trunk for the new set of tasks, and take over what they have in common: "
            "load_trunk(new, old.state_dict(), strict=False)."
        )


def _begin_anew(module: MultiTaskModule) -> None:
    """Forget what was sized for the former tasks; the next Trainer, or fit, gets the recorder of the new ones."""
    module.recorder = Recorder(module.tasks)
    module.optimization = Optimization(module.recorder)
