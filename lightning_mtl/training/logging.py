"""The recorder logs what a module reports: as vectors over the tasks, under fixed names."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_mtl.devices import fetch, numbers, send, widest
from lightning_mtl.distributed import log_reduced, sum_over
from lightning_mtl.method.signals import Signals
from lightning_mtl.task import Task
from lightning_mtl.task.module import TaskModule
from lightning_mtl.task.shapes import SeenShapes
from lightning_mtl.training.absent import warn_of_untrained
from lightning_mtl.training.checks import check_model, check_trainer
from lightning_mtl.training.dashboard import prepare_loggers
from lightning_mtl.training.losses import LabelCounts
from lightning_mtl.training.scales import LossScales, warn_of_units
from lightning_mtl.training.schedulers import DueSchedulers
from lightning_mtl.training.scores import Scores, StageMetrics, change_from_baselines
from lightning_mtl.training.targets import follow_targets
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
        self._move(losses.device)
        if len(names) == len(self.totals):
            self.totals += losses * samples
            self.counts += samples
        else:
            index = numbers([self._position[name] for name in names], losses.device)
            self.totals.index_add_(0, index, (losses * samples).to(self.totals))
            self.counts.index_add_(0, index, torch.ones_like(losses).mul(samples).to(self.totals))

    def means(self, module: pl.LightningModule) -> list[float | None]:
        """The mean losses over all ranks, None for a task without a sample, and begin anew."""
        # A rank without a loss so far, or after a resume, has its sums on the CPU, where NCCL reduces nothing.
        self._move(module.device)
        sums = sum_over(module.trainer, torch.stack([self.totals, self.counts]))
        self.totals.zero_()
        self.counts.zero_()
        return [total / count if count else None for total, count in sums.T.tolist()]

    def _move(self, device: torch.device) -> None:
        if self.totals.device != device:  # where there is no float64, the sums of an epoch fit float32
            dtype = widest(device)
            self.totals, self.counts = send(self.totals, device, dtype), send(self.counts, device, dtype)


class Recorder(Callback):
    """Logs what every :class:`~lightning_mtl.MultiTaskModule` reports; the module brings it along, once a Trainer.

    It also keeps what only a callback can: the epoch's running means over an interruption, and the schedulers that are
    ``due``. ``scores`` holds, for each stage, what its last epoch gave each task that had samples; ``results`` the
    metrics that TensorBoard's HPARAMS shows, None for those of the validation.
    """

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        self.tasks = dict(tasks)
        self.losses = {stage: LossMeans(tasks) for stage in ("train", "val", "test")}
        self.labels = LabelCounts(tasks)
        self.scores: dict[str, Scores] = {stage: {} for stage in self.losses}
        self.shapes = SeenShapes()
        self.scales = LossScales.of_tasks(tasks)
        self._metrics = StageMetrics()
        self._vectors: dict[str, tuple[Sequence[str], Tensor]] = {}
        self._penalties: Mapping[str, Tensor] = {}
        self._callback_metrics: dict[str, Tensor] = {}
        self.unlogged = False
        self.results: Sequence[str] | None = None
        self.due = DueSchedulers()

    # Steps

    @property
    def latest_tasks(self) -> Sequence[str]:
        """The tasks of the newest step."""
        return self._vectors["loss"][0] if self._vectors else ()

    def count(self, window: Window, *, finite: bool) -> None:
        """Count a step's losses into the epoch's means, unless the step is skipped."""
        for names, losses, samples in window.local if finite else ():
            self.losses["train"].add(losses, samples, names)

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
        self.count(window, finite=True)
        tasks, losses, norms = signals.tasks, signals.losses, signals.norms
        if weights is not None and len(positions) < len(weights):
            weights = weights[numbers(positions, weights.device)]
        if signals.step == 0:
            warn_of_units(tasks, losses, weights)
        if window.scales is not None:
            # Users see losses in the tasks' own units, and what multiplied them.
            scales = window.scales.of(positions)
            losses = losses * scales
            norms = None if norms is None else norms * scales
            weights = None if weights is None else weights / scales
            window.scales.follow(positions, losses)
        self._vectors = {"loss": (tasks, losses)}
        if norms is not None:
            self._vectors["grad_norm"] = (tasks, norms)
        if weights is not None:
            self._vectors["weight"] = (tasks, weights)
        if rates is not None:
            self._vectors["lr"] = rates
        self._penalties = window.penalties
        self.unlogged = True
        # Where ModelCheckpoint, EarlyStopping and schedulers look, whenever they do: the values stay on their device.
        self._callback_metrics.update(_scalars(self._vectors, self._penalties))

    def log_step(self, module: pl.LightningModule) -> None:
        """Log the newest vectors as scalars: called where the Trainer is about to write to its loggers."""
        self._log_latest(module, on_step=True)

    def _log_latest(self, module: pl.LightningModule, *, on_step: bool) -> None:
        vectors, penalties = list(self._vectors.items()), list(self._penalties)
        found = fetch(*(vector for _, (_, vector) in vectors), *self._penalties.values())  # all that lies on a device
        by_name = {name: (tasks, vector) for (name, (tasks, _)), vector in zip(vectors, found, strict=False)}
        scalars = _scalars(by_name, dict(zip(penalties, found[len(vectors) :], strict=True)))
        # Not self.log, which makes a metric object of every scalar: 0.6 ms each, and keeps it from step to step.
        # An epoch's end belongs to the last batch's place on the axis, as where Lightning logs it.
        step = None if on_step else module.trainer.fit_loop.epoch_loop._batches_that_stepped - 1
        module.trainer._logger_connector.log_metrics(scalars, step=step)
        module.trainer.progress_bar_metrics["loss/total"] = float(scalars["loss/total"])
        self.unlogged = False

    # Stages

    def setup(self, trainer: pl.Trainer, pl_module: TaskModule, stage: str) -> None:  # type: ignore[override]
        """Refuse, before training begins, what cannot work."""
        self.shapes.clear()
        if stage == "fit":
            check_trainer(pl_module, trainer)
            self.scores.update({of: {} for of in ("train", "val")})
            self.due.after = -1
            self.labels.reset()
            if self.scales is not None:
                self.scales.reset()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Check the model; lay out TensorBoard's charts, and log the method's hyperparameters."""
        check_model(pl_module, trainer)
        prepare_loggers(trainer, pl_module, self.results)

    def on_train_start(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Remember where callbacks look for metrics: the Trainer's own, for this run."""
        self._callback_metrics = trainer.callback_metrics

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: TaskModule, batch: Any, batch_idx: int) -> None:  # type: ignore[override]  # noqa: ANN401
        """Step the schedulers that waited for the last batch's validation; have buffers broadcast as they should be.

        Running statistics of targets follow the step's first batch.

        Lightning's manual optimization keeps DDP from broadcasting buffers, of BatchNorm for instance, after the first
        step; automatic optimization does it at the first micro-batch of each window.
        """
        if isinstance(trainer.strategy.model, DistributedDataParallel) and not pl_module.automatic_optimization:
            trainer.strategy.model.require_forward_param_sync = pl_module.opens_window
        self.labels.counting = trainer.current_epoch == 0
        if self.due.waiting is not None:
            self.due.step_waiting(pl_module)
        if pl_module.target_units and pl_module.opens_window:
            follow_targets(pl_module, trainer, batch)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: TaskModule, *_: Any) -> None:  # type: ignore[override]  # noqa: ANN401
        """Step the schedulers after a batch that takes no step, such as None."""
        self.due.step_outstanding(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Log the epoch's means and the last step's values, and step the schedulers that follow an epoch's metric."""
        if self.unlogged:
            self._log_latest(pl_module, on_step=False)
        self._log_stage(pl_module, "train", "loss_epoch")
        if shares := getattr(getattr(trainer, "datamodule", None), "shares", None):
            log_reduced(pl_module, {f"share/{task}": share for task, share in shares.items()})
        if trainer.current_epoch == 0:
            self.labels.log(pl_module)
            warn_of_untrained(pl_module, [task for task, found in self.scores["train"].items() if "loss" in found])
        if pl_module.automatic_optimization:
            return
        self.due.step_waiting(pl_module)
        self.due.step_outstanding(pl_module)  # where the module's on_train_batch_start has ended the epoch
        self.due.waiting = "epoch", trainer.current_epoch
        if not is_overridden("on_train_epoch_end", pl_module):  # or what it logs may be what a scheduler follows
            self.due.step_waiting(pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Step the schedulers that waited for what the module logged at the last epoch's end."""
        self.due.step_waiting(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Step the schedulers that still wait."""
        self.due.step_waiting(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Log the validation's losses, metrics and delta_m."""
        self._log_stage(pl_module, "val", "val/loss")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: TaskModule) -> None:  # type: ignore[override]
        """Log the test's losses, metrics and delta_m."""
        self._log_stage(pl_module, "test", "test/loss")

    def _log_stage(self, module: TaskModule, stage: str, loss_name: str) -> None:
        means = self.losses[stage].means(module)
        scores = {task: {"loss": mean} for task, mean in zip(self.tasks, means, strict=True) if mean is not None}
        values = {f"{loss_name}/{task}": score["loss"] for task, score in scores.items()}
        if scores and stage != "train":
            values[f"{stage}/loss/total"] = sum(score["loss"] for score in scores.values())
        for task, own in self._metrics.compute(module, stage).items():
            values.update((f"{stage}/{name}/{task}", value) for name, value in own.items())
            scores.setdefault(task, {}).update(own)
        if not module.trainer.sanity_checking:  # which sees a part of the data
            self.scores[stage] = scores
        if stage != "train":
            compared = change_from_baselines(self.tasks, scores, module.delta_m_over)
            values |= {} if compared is None else {f"{stage}/delta_m": compared}
        log_reduced(module, values)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The running means of the epoch, and what a waiting scheduler will need."""
        train = self.losses["train"]
        return {
            "loss_sums": torch.stack([train.totals, train.counts]),
            "labels": self.labels.state_dict(),
            "plateau_due": self.due.waiting,
            "scheduled": self.due.after,
            "loss_scales": None if self.scales is None else self.scales.values,
            "scores": {stage: {task: dict(of) for task, of in found.items()} for stage, found in self.scores.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the means of the interrupted epoch."""
        self.losses["train"].totals, self.losses["train"].counts = state_dict["loss_sums"].clone().unbind()
        self.labels.load_state_dict(state_dict["labels"])
        self.due.waiting, self.due.after = state_dict["plateau_due"], state_dict["scheduled"]
        if self.scales is not None and (scales := state_dict.get("loss_scales")) is not None:
            self.scales.load(scales)
        self.scores.update(state_dict.get("scores", {}))


def _scalars(vectors: Mapping[str, tuple[Sequence[str], Tensor]], penalties: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Vectors over tasks as scalars by name, with the penalties and the total, where the vectors are."""
    scalars: dict[str, Tensor] = {}
    for name, (tasks, vector) in vectors.items():
        scalars.update(zip(_keys(name, tuple(tasks)), vector.detach().to(torch.float32).unbind(), strict=True))
    scalars.update((f"penalty/{name}", value.to(torch.float32)) for name, value in penalties.items())
    losses = vectors["loss"][1]
    scalars["loss/total"] = (losses * vectors["weight"][1] if "weight" in vectors else losses).sum()
    return scalars


@functools.cache
def _keys(name: str, tasks: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a vector's entries; kept, for they are needed in every step."""
    return tuple(f"{name}/{task}" for task in tasks)
