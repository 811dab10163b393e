"""Reports whether learning together helped, task by task, beyond the noise of seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger

from lightning_mtl.metrics import Interval, bootstrap_interval, delta_m, mean_rank, transfer_gain
from lightning_mtl.monitors.figures import draw_intervals
from lightning_mtl.monitors.loggers import log_figure, log_text
from lightning_mtl.monitors.report import Report, Shown
from lightning_mtl.monitors.tables import Grid, marked
from lightning_mtl.transfer.baselines import SingleTaskBaselines
from lightning_mtl.transfer.finished import TaskScores, chosen_scores, interval_of, is_finished, of_seeds

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class TransferReport(Report):
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

    A seed has diverged for a run where a task's loss, or a score that is compared, is not finite. All numbers are over
    the seeds that the baselines and every run finished, so that pairs stay pairs, and a run with diverged seeds is
    marked "(n of N seeds)" wherever it is shown. A run that finished no seed has no numbers (NaN), and is not waited
    for.

    Args:
        baselines: What each task scores alone.
        runs: ``{name: scores}``, a method or a grouping to each name, and for each of the baselines' seeds, in their
            order, ``{task: {metric: value}}``, as :func:`~lightning_mtl.transfer.train_and_score` and
            :func:`~lightning_mtl.transfer.task_scores` give them. Groups of tasks trained apart are one run, their
            scores put together.
        confidence: Of the intervals, between 0 and 1.

    Attributes:
        seeds: Those that the baselines and every run finished, over which all numbers are.

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
        bootstrap_interval([0.0], confidence=confidence, num_resamples=1)  # refuses what is out of range now
        self._alone = [chosen_scores(own, directions) for own in baselines.scores]
        finished = {name: self.finished(name) for name in runs}
        common = set(self.finished()).intersection(*(own for own in finished.values() if own))
        self.seeds = tuple(seed for seed in baselines.seeds if seed in common)
        self._places = [place for place, seed in enumerate(baselines.seeds) if seed in common]
        self._compared = [name for name, own in finished.items() if own]
        self._gains = {
            name: {task: self._against_baselines(name, [task], transfer_gain) for task in baselines.tasks}
            for name in runs
        }
        self._delta_m = {name: self._against_baselines(name, baselines.tasks, delta_m) for name in runs}
        self._ranks = self._ranks_of_runs()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Return the tasks' names."""
        return self.baselines.tasks

    def finished(self, run: str | None = None) -> tuple[int, ...]:
        """Return the seeds that a run, or None for the baselines, finished with finite losses and scores."""
        scores = self._alone if run is None else self.runs[run]
        return tuple(seed for seed, own in zip(self.baselines.seeds, scores, strict=True) if is_finished(own))

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
        pairs = zip(self._delta_m[run], self._delta_m[other], strict=False)  # a run without a seed has no pair
        return self._interval([own - others for own, others in pairs])

    def hurt(self, run: str) -> list[str]:
        """Return the tasks that learning together made worse beyond noise: negative transfer."""
        return [task for task in self.tasks if self.gain(run, task).high < 0]

    def helped(self, run: str) -> list[str]:
        """Return the tasks that learning together made better beyond noise."""
        return [task for task in self.tasks if self.gain(run, task).low > 0]

    # What it looks like

    def shown(self) -> Shown:
        """Return the table of gains, delta_m and mean ranks with their intervals."""
        return Shown(self._grid(), "Gain of each task over training it alone, %", self._caption())

    def records(self) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
        """Return everything, a row each: run, quantity, task, metric, mean, both ends of the interval, seeds, finished.

        The quantities are ``gain``, ``delta_m``, ``mean_rank`` and ``score``; the run of the baselines is ``alone``.
        ``seeds`` is the number of seeds behind the mean, ``finished`` says "n of N" of those that the run finished.
        """
        rows: list[tuple[str, str, str, str, Interval]] = []
        for run in self.runs:
            rows.extend((run, "gain", task, "", self.gain(run, task)) for task in self.tasks)
            rows.append((run, "delta_m", "", "", self.delta_m(run)))
            rows.append((run, "mean_rank", "", "", self.mean_rank(run)))
        shown = {"alone": self._alone, **self.runs}
        behind = {"alone": len(self.seeds)} | {run: len(self._delta_m[run]) for run in self.runs}
        finished = {"alone": len(self.finished())} | {run: len(self.finished(run)) for run in self.runs}
        for run, scores in shown.items():
            paired = [scores[place] for place in self._places[: behind[run]]]
            rows.extend(
                (run, "score", task, metric, self._interval([seed[task][metric] for seed in paired]))
                for task, metrics in self.baselines.higher_is_better.items()
                for metric in metrics
            )
        asked = len(self.baselines.seeds)
        columns = ("run", "quantity", "task", "metric", "mean", "low", "high", "seeds", "finished")
        return columns, [
            (run, *names, *interval, behind[run], f"{finished[run]} of {asked}") for run, *names, interval in rows
        ]

    def figure(self) -> Figure:
        """Draw every task's gain in every run with its interval, and -delta_m as that of all tasks.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        gains: dict[str, list[Interval]] = {}
        for run in self.runs:
            mean, low, high = self.delta_m(run)
            gains[self._name(run)] = [*(self.gain(run, task) for task in self.tasks), Interval(-mean, -high, -low)]
        return draw_intervals(gains, [*self.tasks, "all (-Δm)"], title="gain over training each task alone, %")

    def log(self, to: pl.Trainer | Logger, *, step: int = 0, figure: bool = True) -> None:
        """Log the report: numbers to any logger, table and picture to those that take them, as TensorBoard does.

        Numbers are ``transfer/gain/<run>/<task>``, ``transfer/delta_m/<run>``, but for a run without any, and
        ``transfer/seeds/<run>``, how many seeds it finished.

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
        numbers = {name: value for name, value in numbers.items() if not math.isnan(value)}
        numbers.update({f"transfer/seeds/{run}": float(len(self.finished(run))) for run in self.runs})
        for logger in loggers:
            logger.log_metrics(numbers, step=step)
        log_text(loggers, "transfer", self.markdown(), step)
        if figure:
            log_figure(loggers, "transfer", self.figure(), step)
        for logger in loggers:
            logger.save()

    def _interval(self, values: Sequence[float]) -> Interval:
        return interval_of(values, confidence=self.confidence)

    def _name(self, run: str) -> str:
        return run + of_seeds(len(self.finished(run)), len(self.baselines.seeds))

    def _against_baselines(
        self,
        run: str,
        tasks: Sequence[str],
        change: Callable[[Sequence[float], Sequence[float], Sequence[bool]], float],
    ) -> list[float]:
        """What changes with each seed of the pairs; nothing for a run that finished none."""
        directions = self.baselines.higher_is_better
        compared = [(task, metric) for task in tasks for metric in directions[task]]
        higher = [directions[task][metric] for task, metric in compared]
        return [
            change(
                [self.runs[run][place][task][metric] for task, metric in compared],
                [self._alone[place][task][metric] for task, metric in compared],
                higher,
            )
            for place in (self._places if run in self._compared else ())
        ]

    def _ranks_of_runs(self) -> dict[str, list[float]]:
        """For each run, its mean rank with each seed, among the runs that finished any."""
        directions = self.baselines.higher_is_better
        compared = [(task, metric) for task, metrics in directions.items() for metric in metrics]
        higher = [directions[task][metric] for task, metric in compared]
        ranks: dict[str, list[float]] = {run: [] for run in self.runs}
        for place in self._places if self._compared else ():
            scores = [[self.runs[run][place][task][metric] for task, metric in compared] for run in self._compared]
            for run, rank in zip(self._compared, mean_rank(scores, higher), strict=True):
                ranks[run].append(rank)
        return ranks

    def _grid(self) -> Grid:
        asked = len(self.baselines.seeds)
        grid = Grid(["task", f"alone{of_seeds(len(self.finished()), asked)}", *map(self._name, self.runs)])
        for task, metrics in self.baselines.higher_is_better.items():
            paired = {metric: [self._alone[place][task][metric] for place in self._places] for metric in metrics}
            means = {metric: self._interval(values).mean for metric, values in paired.items()}
            alone = ", ".join(
                f"{metric} {'–' if math.isnan(mean) else f'{mean:.4g}'}" for metric, mean in means.items()
            )
            grid.add(task, alone, *(marked(self.gain(run, task)) for run in self.runs))
        grid.end_section()
        grid.add("Δm, %", "", *(marked(self.delta_m(run), lower_is_better=True) for run in self.runs))
        if len(self.runs) > 1:
            grid.add("mean rank", "", *(marked(self.mean_rank(run), sign="", beyond=False) for run in self.runs))
        return grid

    def _caption(self) -> str:
        number, asked = len(self.seeds), len(self.baselines.seeds)
        diverged = any(len(self.finished(run)) < asked for run in (None, *self.runs))
        which = ""
        if diverged:
            listed = ", ".join(map(str, self.seeds)) or "none"
            which = (
                "Runs marked (n of N seeds) diverged with the others: a loss or a score is not finite. All numbers are "
                f"over the seeds that every column with any finished: {listed}. "
            )
        if number == 0:
            return which.rstrip()
        if number == 1:
            return (
                f"{which}One seed: nothing here can be told from noise. Gain: positive is better. Δm: negative is "
                "better."
            )
        few = " Few seeds make these intervals too narrow: 3 hold the true mean in 76 % of cases, 10 in 90 %."
        return (
            f"{which}Gain: positive is better. Δm: negative is better. Mean over {number} seeds and its "
            f"{100 * self.confidence:.0f} % bootstrap interval.{few if number < 10 and self.confidence == 0.95 else ''}"
        )
