"""Freezing schedules: which parts of a model train from which epoch on, and how fast."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from lightning_mtl.finetuning.plan import (
    UnfreezingPart,
    by_epoch,
    check_groups,
    check_place,
    check_schedule,
    from_the_top,
)
from lightning_mtl.module import MultiTaskModule
from lightning_mtl.task.module import Depth

log = logging.getLogger(__name__)


class GradualUnfreezing(BaseFinetuning):
    r"""Freeze the trunk and unfreeze it part by part, each part with a learning rate of its own if asked.

    .. math:: \eta_i = \eta \, d^{\,i}, \qquad i = 1, 2, \dots \text{ in the order of unfreezing}

    Training begins with the heads alone; the trunk's upper layers, nearest to the tasks, follow before the lower ones.
    It works with every weighting. What is measured follows what trains: rows, norms and Gramians are those of the
    shared parameters that are not frozen. As long as all of them are, there is nothing to balance by gradients: all
    weights are 1, and a method that measures gradients is not asked. Weights from losses alone scale the heads
    meanwhile, where the method scales heads.

    Frozen parameters stay in the optimizer, which passes them over: no group is added on the way, so that every
    scheduler works and an interrupted training resumes to the bit. With learning rates per depth, each part has a
    group, ``"trunk/<part>"``: the module's ``optimizer=`` argument gets them by itself, an overridden
    ``configure_optimizers`` asks :meth:`~lightning_mtl.MultiTaskModule.parameter_groups` for them. With DDP, whose
    reducer knows only what trained when the model was wrapped, the model is wrapped anew when a part is unfrozen.

    Args:
        schedule: ``{epoch: name or names}`` of modules as in ``module.named_modules()``, such as
            ``{1: "trunk.4", 3: "trunk"}``. A parameter is unfrozen with the first that names it. What of the trunk is
            never named stays frozen, and what is named outside of it is frozen until then, too.
        every_n_epochs: In place of a schedule: the parts of ``layers`` are unfrozen from the last to the first, one
            every n epochs, the first of them after n epochs; then whatever else the trunk has.
        layers: The module whose children are these parts, such as ``"trunk.encoder.layer"``.
        lr_decay: d above, for the i-th part to be unfrozen.
        lr_factors: In place of it, one factor for each part in the order of unfreezing.
        train_bn: Let batch normalization in frozen parts go on learning. Otherwise it is in evaluation mode until it
            is unfrozen: it normalizes by the statistics it came with, as it will at inference, and leaves them alone.

    Parameters that were frozen before the fit stay so: an adapter's base model, for instance. After the fit all
    parameters can be trained that could be before it.

    Raises:
        ValueError: If an argument is out of its range; at setup if a name is unknown or there is nothing to unfreeze,
            if the weighting measures at a module that is unfrozen later than others, or if the optimizer lacks a
            parameter or a group.
        TypeError: At setup, if the module is no :class:`~lightning_mtl.MultiTaskModule`.

    Source: gradual unfreezing and discriminative fine-tuning are Howard and Ruder's, Universal Language Model
    Fine-tuning for Text Classification, 2018 (arXiv:1801.06146), with d = 1/2.6. They unfreeze a layer an epoch.

    Deviations: Lightning's own callbacks let frozen batch normalization use the batch's statistics, and add a group to
    the optimizer when a part is unfrozen, which most schedulers do not survive.

    Example:
        >>> GradualUnfreezing({1: "trunk.2", 3: ["trunk.0", "trunk.1"]}).schedule
        {1: ('trunk.2',), 3: ('trunk.0', 'trunk.1')}
        >>> halved = GradualUnfreezing(every_n_epochs=2, lr_decay=0.5)
    """

    def __init__(
        self,
        schedule: Mapping[int, str | Sequence[str]] | None = None,
        *,
        every_n_epochs: int | None = None,
        layers: str = "trunk",
        lr_decay: float = 1.0,
        lr_factors: Sequence[float] | None = None,
        train_bn: bool = False,
    ) -> None:
        super().__init__()
        if (schedule is None) == (every_n_epochs is None):
            raise ValueError("GradualUnfreezing takes schedule={epoch: names} or every_n_epochs=n, one of the two.")
        if every_n_epochs is not None and every_n_epochs < 1:
            raise ValueError(f"GradualUnfreezing(every_n_epochs={every_n_epochs}) must be at least 1.")
        if lr_factors is not None and lr_decay != 1:
            raise ValueError("GradualUnfreezing takes lr_decay or lr_factors, not both.")
        for name, factor in [("lr_decay", lr_decay), *(("lr_factors", factor) for factor in lr_factors or ())]:
            if not (math.isfinite(factor) and factor > 0):
                raise ValueError(f"GradualUnfreezing({name}=...) holds {factor}; factors must be above 0 and finite.")
        self.schedule = None if schedule is None else check_schedule(schedule)
        self.every_n_epochs, self.layers = every_n_epochs, layers
        self.lr_decay, self.lr_factors = lr_decay, None if lr_factors is None else tuple(lr_factors)
        self.train_bn = train_bn
        self.unfrozen = 0
        self._stages: list[UnfreezingPart] = []
        self._frozen: set[nn.Parameter] = set()
        self._modes: dict[nn.Module, bool] = {}

    # Before training

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Freeze the trunk at the beginning of a fit, and unfreeze what its first epoch trains."""
        if stage != "fit":
            return
        if not isinstance(pl_module, MultiTaskModule):
            raise TypeError(
                f"GradualUnfreezing unfreezes the trunk of a lightning_mtl.MultiTaskModule, found "
                f"{type(pl_module).__name__}; subclass MultiTaskModule."
            )
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                "GradualUnfreezing would change what FSDP2 has sharded to be trained; use strategy='ddp', or freeze by "
                "hand, for the whole training, before fully_shard."
            )
        self._restore()
        self.unfrozen = 0
        self._stages = self._plan(pl_module)
        check_place(self._stages, pl_module)
        pl_module.depths = ()
        factors = self._factors()
        if any(factor != 1 for factor in factors):
            pl_module.depths = tuple(
                Depth(stage.label, frozenset(stage.parameters), factor)
                for stage, factor in zip(self._stages, factors, strict=True)
            )
        self.freeze_before_training(pl_module)
        self._unfreeze_until(trainer.current_epoch)

    def freeze_before_training(self, pl_module: pl.LightningModule) -> None:
        """Freeze the trunk and whatever else the schedule names."""
        parts = [pl_module.trunk, *(module for stage in self._stages for module in stage.modules)]
        inside = {child: None for part in parts if isinstance(part, nn.Module) for child in part.modules()}
        for module in inside:
            normalizes = isinstance(module, _BatchNorm)
            if normalizes and self.train_bn:
                continue
            if normalizes:
                self._modes[module] = module.training
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
                    self._frozen.add(parameter)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Unfreeze what was unfrozen when the checkpoint was written, before the model is wrapped for several ranks."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is None or not self._stages:
            return
        labels = [stage.label for stage in self._stages]
        if state["stages"] != labels:
            raise ValueError(
                f"The checkpoint's GradualUnfreezing unfreezes {state['stages']} one after another, this one {labels}; "
                "resume with the same schedule, or load the model's weights alone."
            )
        while self.unfrozen < state["unfrozen"]:
            self._unfreeze_next()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse an optimizer that lacks what is unfrozen later, or in which parts of different depth share a group."""
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        held = {parameter for group in groups for parameter in group["params"]}
        lacking = [stage.label for stage in self._stages if not held.issuperset(stage.parameters)]
        if lacking:
            raise ValueError(
                f"The optimizer lacks parameters of {lacking}, which are unfrozen later. Give it all parameters, also "
                "frozen ones, which it passes over: self.parameters() or self.parameter_groups(lr) in "
                "configure_optimizers."
            )
        depths = pl_module.depths if isinstance(pl_module, MultiTaskModule) else ()
        check_groups(groups, depths, fresh=trainer.ckpt_path is None)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let frozen batch normalization use the statistics it came with; no sooner, or Lightning warns of it."""
        for module in self._modes:
            module.eval()

    # During training

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Unfreeze what this epoch begins with."""
        before = self.unfrozen
        self.finetune_function(pl_module, trainer.current_epoch, trainer.optimizers[0])
        if self.unfrozen > before:
            _wrap_anew(trainer, pl_module)

    def finetune_function(self, pl_module: pl.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        """Unfreeze the parts that are due; the optimizer has their parameters already."""
        self._unfreeze_until(epoch)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the model as trainable as it was."""
        if stage == "fit":
            self._restore()
            if isinstance(pl_module, MultiTaskModule):
                pl_module.depths = ()

    def _unfreeze_until(self, epoch: int) -> None:
        while self.unfrozen < len(self._stages) and self._stages[self.unfrozen].epoch <= epoch:
            self._unfreeze_next()

    def _unfreeze_next(self) -> None:
        stage = self._stages[self.unfrozen]
        for parameter in stage.parameters:
            if parameter in self._frozen:
                parameter.requires_grad_(True)
        for module in (child for part in stage.modules for child in part.modules()):
            if module in self._modes:
                module.train(self._modes.pop(module))
        self.unfrozen += 1
        log.info("%s is unfrozen: %d parameters.", stage.label, sum(p.numel() for p in stage.parameters))

    def _restore(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        for module, mode in self._modes.items():
            module.train(mode)
        self._frozen, self._modes = set(), {}

    # The plan

    def _plan(self, module: MultiTaskModule) -> list[UnfreezingPart]:
        if self.schedule is not None:
            return by_epoch(module, self.schedule)
        return from_the_top(module, self.layers, self.every_n_epochs or 1)

    def _factors(self) -> list[float]:
        if self.lr_factors is None:
            return [self.lr_decay**depth for depth in range(1, len(self._stages) + 1)]
        if len(self.lr_factors) != len(self._stages):
            raise ValueError(
                f"GradualUnfreezing(lr_factors={list(self.lr_factors)}) has {len(self.lr_factors)} numbers for "
                f"{len(self._stages)} parts to unfreeze, {[stage.label for stage in self._stages]}; give each part one."
            )
        return list(self.lr_factors)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the parts in the order of unfreezing, and how many are unfrozen."""
        return {"stages": [stage.label for stage in self._stages], "unfrozen": self.unfrozen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing, because :meth:`on_load_checkpoint`, which has the module, has read the state."""


def _wrap_anew(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Let DDP see the model as it trains now; a reducer averages only what could be trained when it was made."""
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy) or not isinstance(strategy.model, DistributedDataParallel):
        return
    strategy.model = module
    strategy.configure_ddp()
    # A new reducer learns its static graph anew, in the first backward pass, which Lightning has to let it do.
    strategy._pl_static_graph_delay_done = False
