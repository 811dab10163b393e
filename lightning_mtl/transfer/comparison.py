"""Reports whether learning together helped, task by task, beyond the noise of seeds."""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from lightning_mtl.metrics import (
    Interval,
    bootstrap_interval,
    delta_m,
    mean_rank,
    paired_bootstrap_interval,
    transfer_gain,
)
from lightning_mtl.monitors.figures import draw_intervals
from lightning_mtl.monitors.tables import Grid, marked
from lightning_mtl.transfer.baselines import SingleTaskBaselines
from lightning_mtl.transfer.runs import TaskScores, chosen_scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


class TransferReport:
    r"""Compares multi-task runs with each task trained alone: each task's gain, delta_m, and mean rank.

    Every number is computed for each seed, against the baseline of the same seed, and then averaged over the seeds; the
    bootstrap draws seeds, so that pairs stay together. Per seed these are

    .. math::
        g_k = \mathrm{gain\ of\ task\ } k \text{ over its baseline, in percent, positive is better}, \qquad
        \Delta_m, \text{ negative is better}, \qquad
        R, \text{ the mean rank among the runs, 1 is best}

    as :func:`~lightning_mtl.metrics.transfer_gain`, :func:`~lightning_mtl.metrics.delta_m` and
    :func:`~lightning_mtl.metrics.mean_rank` define them. A task is hurt where the whole interval of its gain lies below
    0, helped where it lies above; with few seeds the intervals are too narrow to be taken at their word, as
    :func:`~lightning_mtl.metrics.bootstrap_interval` shows in numbers.

    Args:
        baselines: What each task scores alone.
        runs: ``{name: scores}``, a method or a grouping to each name, and for each of the baselines' seeds, in their
            order, ``{task: {metric: value}}``, as :func:`~lightning_mtl.transfer.train_and_score` and
            :func:`~lightning_mtl.transfer.task_scores` give them. Groups of tasks trained apart are one run, their
            scores put together.
        confidence: Of the intervals, between 0 and 1.

    Raises:
        ValueError: If there is no run, a run has other seeds in number or lacks a score, a baseline is 0, or
            ``confidence`` is out of its range.

    Example:
        >>> from lightning_mtl.transfer import SingleTaskBaselines
        >>> alone = SingleTaskBaselines((0, 1), ({"a": {"error": 4.0}}, {"a": {"error": 5.0}}), {"a": {"error": False}})
        >>> report = TransferReport(alone, {"equal": [{"a": {"error": 5.0}}, {"a": {"error": 5.5}}]})
        >>> report.gain("equal", "a")
        Interval(mean=-17.5, low=-25.0, high=-10.0)
        >>> report.hurt("equal")
        ['a']
    """

    def __init__(
        self,
        baselines: SingleTaskBaselines,
        runs: Mapping[str, Sequence[TaskScores]],
        *,
        confidence: float = 0.95,
    ) -> None:
        if not runs:
            raise ValueError("TransferReport(runs={}) has nothing to compare; give it {name: [scores of each seed]}.")
        for name, scores in runs.items():
            if len(scores) != len(baselines.seeds):
                raise ValueError(
                    f"Run {name!r} has scores of {len(scores)} seeds, the baselines of {len(baselines.seeds)}: "
                    f"{tuple(baselines.seeds)}. Pairs are compared: train both with the same seeds."
                )
        directions = baselines.higher_is_better
        self.baselines = baselines
        self.runs = {name: [chosen_scores(own, directions) for own in scores] for name, scores in runs.items()}
        self.confidence = confidence
        self._interval = functools.partial(bootstrap_interval, confidence=confidence)
        self._interval([0.0], num_resamples=1)  # refuses a confidence out of range now rather than later
        self._gains = {
            name: {task: self._against_baselines(name, [task], transfer_gain) for task in baselines.tasks}
            for name in runs
        }
        self._delta_m = {name: self._against_baselines(name, baselines.tasks, delta_m) for name in runs}
        self._ranks = dict(zip(runs, self._ranks_of_runs(), strict=True))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Return the tasks' names."""
        return self.baselines.tasks

    def gain(self, run: str, task: str) -> Interval:
        """Return what a task gained in a run, in percent of its scores alone; positive is better."""
        return self._interval(self._gains[run][task])

    def delta_m(self, run: str) -> Interval:
        """Return the mean relative change over all metrics, in percent; negative is better."""
        return self._interval(self._delta_m[run])

    def mean_rank(self, run: str) -> Interval:
        """Return the run's rank among the runs, averaged over metrics: 1 is best, ties share their ranks."""
        return self._interval(self._ranks[run])

    def compare(self, run: str, other: str) -> Interval:
        """Return how much higher a run's delta_m is than another's, seed by seed; negative is better for the first."""
        return paired_bootstrap_interval(self._delta_m[run], self._delta_m[other], confidence=self.confidence)

    def hurt(self, run: str) -> list[str]:
        """Return the tasks that learning together made worse beyond noise: negative transfer."""
        return [task for task in self.tasks if self.gain(run, task).high < 0]

    def helped(self, run: str) -> list[str]:
        """Return the tasks that learning together made better beyond noise."""
        return [task for task in self.tasks if self.gain(run, task).low > 0]

    # What it looks like

    def table(self) -> Table:
        """Make a table of the package rich for the console; green and red are beyond noise.

        Raises:
            ModuleNotFoundError: If rich is not installed.
        """
        return self._grid().rich(title="Gain of each task over training it alone, %", caption=self._caption())

    def markdown(self) -> str:
        """Write the same table in Markdown; bold is beyond noise."""
        return f"{self._grid().markdown()}\n\n{self._caption()}"

    def to_csv(self, path: str | Path) -> None:
        """Write everything, a row each: run, quantity, task, metric, mean, both ends of the interval, number of seeds.

        The quantities are ``gain``, ``delta_m``, ``mean_rank`` and ``score``; the run of the baselines is ``alone``.
        """
        rows: list[tuple[str, str, str, str, Interval]] = []
        for run in self.runs:
            rows.extend((run, "gain", task, "", self.gain(run, task)) for task in self.tasks)
            rows.append((run, "delta_m", "", "", self.delta_m(run)))
            rows.append((run, "mean_rank", "", "", self.mean_rank(run)))
        for run, scores in {"alone": self.baselines.scores, **self.runs}.items():
            rows.extend(
                (run, "score", task, metric, self._interval([seed[task][metric] for seed in scores]))
                for task, metrics in self.baselines.higher_is_better.items()
                for metric in metrics
            )
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("run", "quantity", "task", "metric", "mean", "low", "high", "seeds"))
            writer.writerows((*names, *interval, len(self.baselines.seeds)) for *names, interval in rows)

    def figure(self) -> Figure:
        """Draw every task's gain in every run with its interval, and -delta_m as that of all tasks.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        gains: dict[str, list[Interval]] = {}
        for run in self.runs:
            mean, low, high = self.delta_m(run)
            gains[run] = [*(self.gain(run, task) for task in self.tasks), Interval(-mean, -high, -low)]
        return draw_intervals(gains, [*self.tasks, "all (-Δm)"], title="gain over training each task alone, %")

    def log(self, to: pl.Trainer | Logger, *, step: int = 0, figure: bool = True) -> None:
        """Log the report: numbers to any logger, table and picture to TensorBoard's text and images tabs.

        Numbers are ``transfer/gain/<run>/<task>`` and ``transfer/delta_m/<run>``.

        Args:
            to: A logger, or a Trainer, for all of its loggers; other ranks than the first log nothing.
            step: The place on the axis.
            figure: Whether to draw, for which matplotlib is needed.

        Raises:
            ValueError: If the Trainer has no logger.
        """
        if isinstance(to, pl.Trainer) and not to.is_global_zero:
            return
        loggers = to.loggers if isinstance(to, pl.Trainer) else [to]
        if not loggers:
            raise ValueError("TransferReport.log got a Trainer without a logger; give it one, or call log(logger).")
        numbers = {f"transfer/gain/{run}/{task}": self.gain(run, task).mean for run in self.runs for task in self.tasks}
        numbers.update({f"transfer/delta_m/{run}": self.delta_m(run).mean for run in self.runs})
        for logger in loggers:
            logger.log_metrics(numbers, step=step)
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("transfer", self.markdown(), step)
                if figure:
                    logger.experiment.add_figure("transfer", self.figure(), step)
            logger.save()

    def _against_baselines(
        self,
        run: str,
        tasks: Sequence[str],
        change: Callable[[Sequence[float], Sequence[float], Sequence[bool]], float],
    ) -> list[float]:
        directions = self.baselines.higher_is_better
        compared = [(task, metric) for task in tasks for metric in directions[task]]
        higher = [directions[task][metric] for task, metric in compared]
        return [
            change(
                [together[task][metric] for task, metric in compared],
                [alone[task][metric] for task, metric in compared],
                higher,
            )
            for together, alone in zip(self.runs[run], self.baselines.scores, strict=True)
        ]

    def _ranks_of_runs(self) -> list[list[float]]:
        """For each run, its mean rank with each seed."""
        directions = self.baselines.higher_is_better
        higher = [direction for metrics in directions.values() for direction in metrics.values()]
        per_seed = [
            mean_rank([[own[task][m] for task, ms in directions.items() for m in ms] for own in scores], higher)
            for scores in zip(*self.runs.values(), strict=True)
        ]
        return [list(ranks) for ranks in zip(*per_seed, strict=True)]

    def _grid(self) -> Grid:
        means = self.baselines.means()
        grid = Grid(["task", "alone", *self.runs])
        for task in self.tasks:
            alone = ", ".join(f"{metric} {value:.4g}" for metric, value in means[task].items())
            gains = [marked(self.gain(run, task)) for run in self.runs]
            grid.add(task, alone, *gains)
        grid.end_section()
        grid.add("Δm, %", "", *(marked(self.delta_m(run), lower_is_better=True) for run in self.runs))
        if len(self.runs) > 1:
            grid.add("mean rank", "", *(marked(self.mean_rank(run), sign="", beyond=False) for run in self.runs))
        return grid

    def _caption(self) -> str:
        number = len(self.baselines.seeds)
        if number == 1:
            return "One seed: nothing here can be told from noise. Gain: positive is better. Δm: negative is better."
        few = " Few seeds make these intervals too narrow: 3 hold the true mean in 76 % of cases, 10 in 90 %."
        return (
            f"Gain: positive is better. Δm: negative is better. Mean over {number} seeds and its "
            f"{100 * self.confidence:.0f} % bootstrap interval.{few if number < 10 and self.confidence == 0.95 else ''}"
        )
