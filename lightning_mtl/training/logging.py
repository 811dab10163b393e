"""The recorder logs what a module reports: as vectors over the tasks, under fixed names."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import MetricCollection

from lightning_mtl.method.signals import Signals
from lightning_mtl.metrics import delta_m
from lightning_mtl.task import Task, TaskOutput
from lightning_mtl.task.module import TaskModule
from lightning_mtl.training.checks import check_model, check_trainer
from lightning_mtl.training.losses import LabelCounts
from lightning_mtl.training.schedulers import step_schedulers
from lightning_mtl.training.window import Window


class LossMeans:
    """Mean losses of the tasks over a stage, as sums on the device: no transfer, no call a task."""

    def __init__(self, tasks: Iterable[str]) -> None:
        self._position = {task: index for index, task in enumerate(tasks)}
        num_tasks = len(self._position)
        self.totals = torch.zeros(num_tasks, dtype=torch.float64)
        self.counts = torch.zeros(num_tasks, dtype=torch.float64)

    def add(self, losses: Tensor, samples: Tensor | float, names: Sequence[str]) -> None:
        """Count the losses of the tasks with these names, in the module's order, as means over so many samples each."""
        if self.totals.device != losses.device:
            # MPS has no float64; the sums of an epoch fit float32 there.
            dtype = torch.float32 if losses.device.type == "mps" else torch.float64
            self.totals, self.counts = self.totals.to(losses.device, dtype), self.counts.to(losses.device, dtype)
        if len(names) == len(self.totals):
            self.totals += losses * samples
            self.counts += samples
        else:
            index = torch.tensor([self._position[name] for name in names], device=losses.device)
            self.totals.index_add_(0, index, (losses * samples).to(self.totals))
            self.counts.index_add_(0, index, torch.ones_like(losses).mul(samples).to(self.totals))

    def means(self, module: pl.LightningModule) -> list[float | None]:
        """The mean losses over all ranks, None for a task without a sample, and begin anew."""
        sums: Tensor = module.trainer.strategy.reduce(torch.stack([self.totals, self.counts]), reduce_op="sum")
        self.totals.zero_()
        self.counts.zero_()
        return [total / count if count else None for total, count in sums.T.tolist()]


class Recorder(Callback):
    """Logs what every :class:`~lightning_mtl.MultiTaskModule` reports; the module brings it along, once a Trainer.

    It also keeps what only a callback can: the epoch's running means over an interruption, and the schedulers that wait
    for a validation. ``scores`` holds, for each stage, what its last epoch gave each task that had samples;
    ``plateau_due`` the interval and the index for which schedulers that follow a metric are due once it is logged.
    """

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        self.tasks = dict(tasks)
        self.losses = {stage: LossMeans(tasks) for stage in ("train", "val", "test")}
        self.labels = LabelCounts(tasks)
        self.scores: dict[str, dict[str, dict[str, float]]] = {stage: {} for stage in self.losses}
        self._vectors: dict[str, tuple[Sequence[str], Tensor]] = {}
        self._penalties: Mapping[str, Tensor] = {}
        self.unlogged = False
        self.plateau_due: tuple[str, int] | None = None

    # Steps

    def update_metrics(
        self, module: TaskModule, stage: str, outputs: Mapping[str, TaskOutput], step_metric: str | None = None
    ) -> dict[str, Tensor] | None:
        """Count a batch into the stage's metrics; return each task's own value of ``step_metric`` on it, if asked."""
        collections: nn.ModuleDict = getattr(module, f"{stage}_metrics")
        scores: dict[str, Tensor] | None = None if step_metric is None else {}
        for task, output in outputs.items():
            if task not in collections or output.prediction is None or output.target is None:
                continue
            prediction = apply_to_collection(output.prediction, Tensor, Tensor.detach)
            if scores is None:
                collections[task].update(prediction, output.target)  # type: ignore[operator]
            else:
                scores[task] = collections[task](prediction, output.target)[step_metric].detach()
        return scores

    def record_step(
        self,
        window: Window,
        signals: Signals,
        positions: Sequence[int],
        weights: Tensor | None,
        rates: tuple[Sequence[str], Tensor] | None,
    ) -> None:
        """Keep what a step has shown, as vectors over its tasks, until it is due.

        Args:
            window: The step, with its micro-batches' losses and its penalties.
            signals: What was measured.
            positions: The places of the signals' tasks.
            weights: ``[K]`` over all tasks, what multiplied the shared gradients; None where no weights describe it.
            rates: The tasks' own learning rates, for those that have one.
        """
        for names, losses, samples in window.local:
            self.losses["train"].add(losses, samples, names)
        tasks = signals.tasks
        self._vectors = {"loss": (tasks, signals.losses)}
        if signals.norms is not None:
            self._vectors["grad_norm"] = (tasks, signals.norms)
        if weights is not None:
            self._vectors["weight"] = (tasks, weights[positions])
        if rates is not None:
            self._vectors["lr"] = rates
        self._penalties = window.penalties
        self.unlogged = True

    def log_step(self, module: pl.LightningModule) -> None:
        """Log the newest vectors as scalars: called where the Trainer is about to write to its loggers."""
        self._log_latest(module, on_step=True)

    def _log_latest(self, module: pl.LightningModule, *, on_step: bool) -> None:
        scalars = {
            f"{name}/{task}": value
            for name, (tasks, vector) in self._vectors.items()
            for task, value in zip(tasks, vector.detach().float().cpu().unbind(), strict=True)
        }
        scalars.update((f"penalty/{name}", value.float().cpu()) for name, value in self._penalties.items())
        losses = self._vectors["loss"][1]
        scalars["loss"] = (losses * self._vectors["weight"][1]).sum() if "weight" in self._vectors else losses.sum()
        # Not self.log, which makes a metric object of every scalar: 0.6 ms each. As Lightning's LearningRateMonitor
        # does it: to the loggers, and to where ModelCheckpoint, EarlyStopping and schedulers look.
        module.trainer.callback_metrics.update(scalars)
        # An epoch's end belongs to the last batch's place on the axis, as where Lightning logs it.
        step = None if on_step else module.trainer.fit_loop.epoch_loop._batches_that_stepped - 1
        module.trainer._logger_connector.log_metrics(scalars, step=step)
        module.log(
            "loss", scalars["loss"], on_step=on_step, on_epoch=not on_step, prog_bar=True, logger=False, batch_size=1
        )
        self.unlogged = False

    # Stages

    def setup(self, trainer: pl.Trainer, pl_module: TaskModule, stage: str) -> None:  # type: ignore[override]
        """Refuse, before training begins, what cannot work."""
        if stage == "fit":
            check_trainer(pl_module, trainer)
            self.labels.reset()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Lay out TensorBoard's custom scalars: all tasks' weights on one chart, all losses on another."""
        check_model(pl_module, trainer)
        for logger in trainer.loggers:
            if trainer.is_global_zero and isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(self.tensorboard_layout())

    def tensorboard_layout(self) -> dict[str, dict[str, list[str | list[str]]]]:
        """Charts with one line a task, for TensorBoard's custom-scalars tab."""
        charts = {
            "weights": "weight",
            "losses": "loss",
            "gradient norms": "grad_norm",
            "epoch losses": "loss_epoch",
            "validation losses": "val/loss",
            "learning rates": "lr",  # last: empty where no tasks have rates of their own
        }
        # A pattern, no list of tasks: TensorBoard shows a chart once for all runs only where their layouts agree.
        return {"tasks": {title: ["Multiline", [f"^{prefix}/"]] for title, prefix in charts.items()}}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: TaskModule, *_: Any) -> None:  # type: ignore[override]  # noqa: ANN401
        """Step the schedulers that waited for the last batch's validation; have buffers broadcast as they should be.

        Lightning's manual optimization keeps DDP from broadcasting buffers, of BatchNorm for instance, after the first
        step; automatic optimization does it at the first micro-batch of each window.
        """
        if isinstance(trainer.strategy.model, DistributedDataParallel) and not pl_module.automatic_optimization:
            trainer.strategy.model.require_forward_param_sync = pl_module.opens_window
        self.labels.counting = trainer.current_epoch == 0
        self._step_plateau(pl_module)

    def _step_plateau(self, module: TaskModule) -> None:
        if self.plateau_due is not None:
            due, self.plateau_due = self.plateau_due, None
            step_schedulers(module, module.schedules, *due, plateau=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Log the epoch's means and the last step's values, and step the schedulers that follow an epoch's metric."""
        if self.unlogged:
            self._log_latest(pl_module, on_step=False)
        self._log_stage(pl_module, "train", "loss_epoch")
        if trainer.current_epoch == 0:
            self.labels.log(pl_module)
        if pl_module.automatic_optimization:
            return
        self._step_plateau(pl_module)
        self.plateau_due = "epoch", trainer.current_epoch
        if not is_overridden("on_train_epoch_end", pl_module):  # or what it logs may be what a scheduler follows
            self._step_plateau(pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Step the schedulers that waited for what the module logged at the last epoch's end."""
        self._step_plateau(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Step the schedulers that still wait."""
        self._step_plateau(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Log the validation's losses, metrics and delta_m."""
        self._log_stage(pl_module, "val", "val/loss")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Log the test's losses, metrics and delta_m."""
        self._log_stage(pl_module, "test", "test/loss")

    def _log_stage(self, module: TaskModule, stage: str, loss_name: str) -> None:
        means = self.losses[stage].means(module)
        scores = {task: {"loss": mean} for task, mean in zip(self.tasks, means, strict=True) if mean is not None}
        values: dict[str, float | Tensor] = {f"{loss_name}/{task}": score["loss"] for task, score in scores.items()}
        if scores and stage != "train":
            values[f"{stage}/loss"] = sum(score["loss"] for score in scores.values())
        collections = module.stage_metrics(stage)
        updated = torch.tensor([float(any(m.update_called for m in ms.values())) for ms in collections.values()])
        # Every rank has to take part in the metrics' own synchronisation, or none.
        counts = module.trainer.strategy.reduce(updated.to(module.device), reduce_op="sum").tolist()
        for (task, metrics), count in zip(collections.items(), counts, strict=True):
            for name, value in _compute(task, metrics).items() if count else ():
                values[f"{stage}/{name}/{task}"] = value
                scores.setdefault(task, {})[name] = float(value)
        self.scores[stage] = scores
        if stage != "train" and (compared := self._delta_m(scores)) is not None:
            values[f"{stage}/delta_m"] = compared
        module.log_dict(
            {name: torch.as_tensor(value, dtype=torch.float32) for name, value in values.items()}, batch_size=1
        )

    def _delta_m(self, scores: Mapping[str, Mapping[str, float]]) -> float | None:
        compared = [
            (scores[name][metric], baseline, task.higher_is_better(metric))
            for name, task in self.tasks.items()
            for metric, baseline in (task.baseline or {}).items()
            if metric in scores.get(name, {})
        ]
        return delta_m(*zip(*compared, strict=True)) if compared else None

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The running means of the epoch, and what a waiting scheduler will need."""
        train = self.losses["train"]
        return {
            "loss_sums": torch.stack([train.totals, train.counts]),
            "labels": self.labels.state_dict(),
            "plateau_due": self.plateau_due,
            "scores": {stage: {task: dict(of) for task, of in found.items()} for stage, found in self.scores.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the means of the interrupted epoch."""
        self.losses["train"].totals, self.losses["train"].counts = state_dict["loss_sums"].clone().unbind()
        self.labels.load_state_dict(state_dict["labels"])
        self.plateau_due = state_dict["plateau_due"]
        self.scores.update(state_dict.get("scores", {}))


def _compute(task: str, metrics: MetricCollection) -> dict[str, Tensor]:
    """Compute and reset a task's metrics."""
    with warnings.catch_warnings():
        # A rank without a sample has nothing to compute from but what the others send.
        warnings.filterwarnings("ignore", message=".*was called before the ``update`` method.*")
        values: dict[str, Tensor] = metrics.compute()
    metrics.reset()
    for name, value in values.items():
        if value.numel() != 1:
            shape = list(value.shape)
            raise ValueError(
                f"Metric {name!r} of task {task!r} computes shape {shape}, which cannot be logged as one number; wrap "
                "it (torchmetrics.ClasswiseWrapper for one value a class), or log it from a callback of your own."
            )
    return values
