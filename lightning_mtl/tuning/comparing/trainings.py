"""One training of a comparison: from a row, a learning rate and a seed to scores, time and gradient figures."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_mtl.method.signals import Signals
from lightning_mtl.monitors import GradientConflict, TaskAffinity
from lightning_mtl.monitors.conflict import conflict_measures
from lightning_mtl.transfer.finished import TaskScores, is_finished
from lightning_mtl.transfer.runs import fit_and_score, only_tasks, seeded, task_scores
from lightning_mtl.tuning.comparing.plan import Training
from lightning_mtl.tuning.comparing.raw_units import with_raw_losses
from lightning_mtl.tuning.comparing.rows import Row
from lightning_mtl.tuning.comparing.setups import Source, declare_anew, has_test_data, stripped

MEASUREMENTS = 40  # of the monitored training, evenly over its steps


@dataclass(frozen=True)
class Outcome:
    """Holds what one training has come to; the study keeps it as JSON.

    Args:
        val: The scores on validation data after the last step; NaN where it diverged.
        test: Those on test data; None where there are none, or it trained for a choice.
        step_seconds: The median from one step's beginning to the next one's, on a CPU of processor time.
        steps: How many optimizer steps it took.
        figures: Of the training with monitors: what :class:`Watched` found.
    """

    val: TaskScores
    test: TaskScores | None
    step_seconds: float
    steps: int
    figures: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


class StepClock(pl.Callback):
    """Measures the time from each step's beginning to the next one's."""

    def __init__(self) -> None:
        self.began: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:  # noqa: ANN401 - Lightning's
        """Note the time."""
        # Other processes on the same cores would slow a wall clock down; a GPU works outside of the process's time.
        on_cpu = trainer.strategy.root_device.type == "cpu"
        self.began.append(time.process_time() if on_cpu else time.perf_counter())

    def median(self) -> float:
        """Return the median in seconds, 0 for less than two steps."""
        steps = [after - before for before, after in zip(self.began, self.began[1:], strict=False)]
        return statistics.median(steps) if steps else 0.0


class GradientFigures(GradientConflict):
    """Keeps the lengths of the tasks' gradients beside their conflicts."""

    def __init__(self, every_n_steps: int) -> None:
        super().__init__(every_n_steps=every_n_steps, figure=False)
        self.norms: dict[str, list[float]] = {}
        self.fractions: list[float] = []

    def observe(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, signals: Signals, weights: Tensor | None
    ) -> None:
        """Note this step's lengths and the share of its pairs that conflict."""
        super().observe(trainer, pl_module, signals, weights)
        if signals.gramian is None or signals.num_tasks < 2:
            return
        for task, norm in zip(signals.tasks, signals.gramian.diagonal().sqrt().tolist(), strict=True):
            self.norms.setdefault(task, []).append(norm)
        if (fraction := conflict_measures(signals.gramian)["fraction"]).isfinite():
            self.fractions.append(float(fraction))

    def figures(self) -> dict[str, Any]:
        """Return the tasks' median lengths, the mean share of conflicting pairs, and how many steps were measured."""
        medians = {task: statistics.median(norms) for task, norms in self.norms.items()}
        found: dict[str, Any] = {"norms": medians, "measured": len(self.fractions)}
        if self.fractions:
            found["conflict"] = statistics.mean(self.fractions)
        return found


class Watched:
    """The monitors of one training.

    Args:
        every_n_steps: In which steps they look.
        lr: The training's learning rate.
    """

    def __init__(self, every_n_steps: int, lr: float) -> None:
        self.gradients = GradientFigures(every_n_steps)
        self.affinity = TaskAffinity(every_n_steps, lr=lr, figure=False)

    @property
    def callbacks(self) -> list[pl.Callback]:
        """Return the monitors."""
        return [self.gradients, self.affinity]

    def figures(self) -> dict[str, Any]:
        """Return what :class:`GradientFigures` found, and of what a step for one task does to another's loss.

        ``affinity`` is ``[K, K]`` in the order of ``tasks``, relative to what the other's own step does; it is left out
        where a pair was never measured.
        """
        found = self.gradients.figures()
        relative = self.affinity.readable(self.affinity.affinity)
        if relative.isfinite().all():
            found |= {"tasks": list(self.affinity.tasks), "affinity": relative.tolist()}
        return found


def train(source: Source, row: Row, training: Training, *, steps: int | None = None) -> Outcome:
    """Train one model and score it after its last step.

    Args:
        source: What makes model, data and Trainer.
        row: What is trained.
        training: The learning rate, the variant, the seed, and what for.
        steps: How many steps another training of this kind took, for the monitored one.
    """
    seed = training.seed
    with seeded(seed):
        parts = source.parts(training.candidate.rate, seed)
        declare_anew(parts.module, row.changes)
        weighting = row.make(training.candidate.variant)
    module = only_tasks(parts.module, parts.module.tasks if training.task is None else [training.task])
    clock = StepClock()
    watched = None
    if training.purpose == "monitor":
        watched = Watched(max(1, (steps or MEASUREMENTS) // MEASUREMENTS), training.candidate.rate)
    callbacks = [clock, *([] if weighting is None else [weighting]), *(watched.callbacks if watched else [])]
    stripped(parts.trainer).callbacks.extend(callbacks)  # type: ignore[attr-defined]
    data = parts.data
    fitted = data if isinstance(data, pl.LightningDataModule) else (data[0], data[1])
    with warnings.catch_warnings():
        # That losses lie far apart is what a comparison shows, and what it gives advice about.
        warnings.filterwarnings("ignore", "In the first step the loss of task", UserWarning)
        try:
            val = fit_and_score(module, fitted, parts.trainer, seed=seed, stage="val")
        except SystemExit as error:  # Lightning's way to end after Ctrl-C
            raise KeyboardInterrupt from error
    test = None
    if training.purpose == "compare" and has_test_data(data):
        test = val
        if is_finished(val):
            where = {"datamodule": data} if isinstance(data, pl.LightningDataModule) else {"dataloaders": data[2]}
            with seeded(seed):
                parts.trainer.test(module, **where, verbose=False)
            test = task_scores(parts.trainer, "test")
    for scores in (val, test or {}):
        with_raw_losses(scores, module.tasks)
    figures = watched.figures() if watched else {}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Outcome(val, test, clock.median(), parts.trainer.global_step, figures)
