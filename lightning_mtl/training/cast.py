"""Who takes part in a fit is looked for once, not in every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_mtl.control.early_stopping import TaskEarlyStopping
from lightning_mtl.distributed import Ranks
from lightning_mtl.learning_rates.task_learning_rate import task_rates_of
from lightning_mtl.method.base import Weighting, weighting_of
from lightning_mtl.monitors.base import Monitor
from lightning_mtl.monitors.throughput import Phases
from lightning_mtl.task.module import TaskModule
from lightning_mtl.training.task_rates import Steering
from lightning_mtl.training.whole import Whole


@dataclass
class Cast:
    """The parts that callbacks, processes and precision play in a fit.

    Attributes:
        weighting: The one weighting; None weighs all tasks equally.
        monitors: All monitors.
        steering: The learning rates of the tasks' own, where a callback gives them.
        stopping: What says which tasks rest; None where all train.
        ranks: The processes with different data.
        sharded: Whether parameters are sharded over the ranks (FSDP2) in a step, too.
        whole: What makes a sharded module without a trunk whole while it takes a step.
        scaler: The gradient scaler of half precision.
        thaws: Whether a callback may unfreeze parameters.
        asks_again: Whether the optimizer may call its closure more than once, as SAM and LBFGS do.
        leaves_out: Whether what no rank's backward pass reaches is left alone, as DDP may be asked to.
        penalizes: Whether the module may have penalties.
    """

    weighting: Weighting | None
    monitors: list[Monitor]
    steering: Steering | None
    stopping: TaskEarlyStopping | None
    ranks: Ranks
    sharded: bool
    whole: Whole | None
    scaler: Any
    thaws: bool
    asks_again: bool
    leaves_out: bool
    penalizes: bool

    @classmethod
    def of(cls, module: TaskModule, phases: Phases) -> Cast:
        """Look at a Trainer that is about to train."""
        trainer, strategy = module.trainer, module.trainer.strategy
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        rates = task_rates_of(trainer)
        shards = isinstance(strategy, ModelParallelStrategy)
        # A process by itself talks to nobody, even where another library has opened a process group.
        ranks = Ranks.alone()
        if trainer.world_size > 1:
            mesh = strategy.device_mesh if isinstance(strategy, ModelParallelStrategy) else None
            ranks = Ranks(None if mesh is None else mesh["data_parallel"].get_group(), phases.waiting)
        return cls(
            weighting=weighting_of(trainer),
            monitors=[callback for callback in callbacks if isinstance(callback, Monitor)],
            steering=None if rates is None else Steering(rates, module),
            stopping=next((c for c in callbacks if isinstance(c, TaskEarlyStopping)), None),
            ranks=ranks,
            sharded=shards and module.the_trunk is not None,
            whole=Whole(ranks) if shards and module.the_trunk is None else None,
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            thaws=any(isinstance(callback, BaseFinetuning) for callback in callbacks),
            asks_again=is_overridden("optimizer_step", module) or any(_asks_again(o) for o in trainer.optimizers),
            leaves_out=(shards and module.the_trunk is None)
            or (
                isinstance(strategy, DDPStrategy)
                and any(strategy._ddp_kwargs.get(name) for name in ("find_unused_parameters", "static_graph"))
            ),
            penalizes=_penalizes(module),
        )


def _asks_again(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer is none of torch's own, of which LBFGS alone calls its closure more than once."""
    return isinstance(optimizer, torch.optim.LBFGS) or not type(optimizer).__module__.startswith("torch.optim.")


def _penalizes(module: TaskModule) -> bool:
    """Whether the module, or a part of its trunk, has penalties of its own; the same on all ranks."""
    definer = next(cls for cls in type(module).__mro__ if "penalties" in vars(cls))
    if "penalties" in vars(module) or definer.__module__ not in ("lightning_mtl.balanced", "lightning_mtl.module"):
        return True
    parts = [] if module.the_trunk is None else module.the_trunk.modules()
    return any(callable(getattr(part, "penalties", None)) for part in parts)
