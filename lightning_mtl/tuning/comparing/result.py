"""The result of a comparison: differences seed by seed, with intervals, as a table, rows of numbers and a picture."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from lightning_mtl.metrics import Interval, delta_m, mean_rank
from lightning_mtl.monitors.report import Report, Shown
from lightning_mtl.monitors.tables import Cell, Grid, console_for_lines
from lightning_mtl.paired import Difference, compare_with_zero, t_interval
from lightning_mtl.transfer.finished import Directions, TaskScores, chosen_scores, is_finished, of_seeds
from lightning_mtl.tuning.comparing.cells import corrected, counted, nothing, rates_text
from lightning_mtl.tuning.comparing.rows import EQUAL, SINGLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RowOutcome:
    """Holds what one row has come to.

    Args:
        name: The row's name.
        scores: ``{seed: its scores}`` of the seeds that were trained; NaN where one diverged.
        rates: The chosen learning rates, of single tasks one for each task; none while one is not chosen.
        at_edge: Of each rate, whether it is still the lowest or the highest of those tried.
        variant: The chosen fixed weights, in words.
        edges: The rates at an edge, in words.
        step_seconds: ``{seed: the median step's time}``.
        failed: The error that kept the row from being trained.
    """

    name: str
    scores: Mapping[int, TaskScores]
    rates: tuple[float, ...] = ()
    variant: str = ""
    edges: tuple[str, ...] = ()
    step_seconds: Mapping[int, float] | None = None
    failed: str = ""
    at_edge: tuple[bool, ...] = ()

    def rates_text(self, tasks: Iterable[str]) -> str:
        """Write the learning rates, a star at those at an edge."""
        return rates_text(self.rates, self.at_edge or (False,) * len(self.rates), tasks)


@dataclass(frozen=True)
class Comparison(Report):
    r"""Compares rows that were trained with the same seeds and budgets.

    Per seed s and row a, over the counted tasks' metrics i (the main tasks', where some are auxiliary):

    .. math::
        \Delta_a^{(s)} = \frac{100}{M} \sum_{i=1}^{M} (-1)^{h_i} \frac{m_{ai}^{(s)} - m_{0i}^{(s)}}{|m_{0i}^{(s)}|}

    as :func:`~lightning_mtl.metrics.delta_m` defines it, in percent, negative is better; m_0 are the scores of equal
    weights, or of the single-task models, with the same seed. Intervals are those of Student's t over the seeds; p is
    that of the mean being 0, after Holm's correction for the number of rows. Metrics that are 0 in a seed of what is
    compared with are left out.

    Args:
        rows: What was trained, in the table's order; equal weights are among them.
        directions: ``{task: {metric: whether higher is better}}``, of all tasks.
        counted: The tasks that Δm and ranks count.
        seeds: The seeds asked for.
        stage: Whether scores are those of test or of validation data.
        left_out: ``{row: why it was not trained}``.
        figures: What the monitors found in a training with equal weights.
        unfinished: How many trainings are missing: other workers run them, or the time was over.
        files: What was written.

    Example:
        >>> rows = (
        ...     RowOutcome("equal weights", {1: {"a": {"loss": 2.0}}, 2: {"a": {"loss": 4.0}}}),
        ...     RowOutcome("MGDA", {1: {"a": {"loss": 1.0}}, 2: {"a": {"loss": 2.2}}}),
        ... )
        >>> result = Comparison(rows, {"a": {"loss": False}}, ("a",), (1, 2), "val")
        >>> round(result.against_equal["MGDA"].interval.mean, 1)
        -47.5
    """

    rows: tuple[RowOutcome, ...]
    directions: Directions
    counted: tuple[str, ...]
    seeds: tuple[int, ...]
    stage: Literal["test", "val"]
    left_out: Mapping[str, str] | None = None
    figures: Mapping[str, Any] | None = None
    unfinished: int = 0
    files: tuple[Path, ...] = ()

    @cached_property
    def chosen(self) -> dict[str, dict[int, TaskScores]]:
        """Return the compared scores of each row by seed, without rows that failed."""
        return {
            row.name: {seed: chosen_scores(own, self.directions) for seed, own in row.scores.items()}
            for row in self.rows
            if not row.failed and row.scores
        }

    def finished(self, row: str) -> list[int]:
        """Return the seeds whose scores are all finite."""
        return [seed for seed, own in self.chosen.get(row, {}).items() if is_finished(own)]

    @cached_property
    def against_equal(self) -> dict[str, Difference]:
        """Return each other row's Δm against equal weights, corrected for the number of rows."""
        return self._against(EQUAL)

    @cached_property
    def against_single(self) -> dict[str, Difference]:
        """Return each other row's Δm against single-task models, corrected likewise; empty where there are none.

        Equal weights and single tasks are tested once: p is that of single tasks against equal weights, unless the two
        mean changes, which have other denominators, agree in sign.
        """
        found = self._against(SINGLE) if self.finished(SINGLE) else {}
        one, known = found.get(EQUAL), self.against_equal.get(SINGLE)
        if one is not None and known is not None and one.interval.mean * known.interval.mean < 0:
            found[EQUAL] = replace(one, p=known.p, p_corrected=known.p_corrected)
        return found

    def changes(self, row: str, base: str, tasks: Sequence[str]) -> dict[int, float]:
        """Return a row's Δm against another by seed, over these tasks' metrics; empty where none can be compared."""
        zeros = self.zeros(base)
        usable = [(task, metric) for task in tasks for metric in self.directions[task] if (task, metric) not in zeros]
        higher = [self.directions[task][metric] for task, metric in usable]
        if not usable:
            return {}
        return {
            seed: delta_m(
                [self.chosen[row][seed][task][metric] for task, metric in usable],
                [self.chosen[base][seed][task][metric] for task, metric in usable],
                higher,
            )
            for seed in self.finished(row)
            if seed in self.finished(base)
        }

    def zeros(self, base: str) -> list[tuple[str, str]]:
        """Return the ``(task, metric)`` that are 0 in a seed of a row: no change relative to them can be told."""
        own = [self.chosen[base][seed] for seed in self.finished(base)]
        return [(i, m) for i, metrics in self.directions.items() for m in metrics if any(one[i][m] == 0 for one in own)]

    def _against(self, base: str) -> dict[str, Difference]:
        names = [name for name in self.chosen if name != base]
        return compare_with_zero({name: list(self.changes(name, base, self.counted).values()) for name in names})

    def task_change(self, row: str, task: str) -> Interval:
        """Return one task's relative change against equal weights, in percent, negative is better; not corrected."""
        return t_interval(list(self.changes(row, EQUAL, [task]).values()))

    def score(self, row: str, task: str, metric: str) -> Interval:
        """Return the mean of a metric over the seeds."""
        return t_interval([self.chosen[row][seed][task][metric] for seed in self.finished(row)])

    @cached_property
    def ranks(self) -> dict[str, float]:
        """Return each row's mean rank over metrics and seeds, 1 is best; a seed that diverged ranks last."""
        cells = [(task, metric) for task in self.counted for metric in self.directions[task]]
        higher = [self.directions[task][metric] for task, metric in cells]
        rows = list(self.chosen.values())  # of a comparison that is under way, the seeds that all of them have
        seeds = [seed for seed in self.seeds if rows and all(seed in own for own in rows)]
        found: dict[str, list[float]] = {name: [] for name in self.chosen}
        for seed in seeds:
            table = []
            for own in self.chosen.values():
                finite = is_finished(own[seed])
                worst = [-math.inf if up else math.inf for up in higher]
                table.append([own[seed][task][metric] for task, metric in cells] if finite else worst)
            for name, rank in zip(found, mean_rank(table, higher), strict=True):
                found[name].append(rank)
        return {name: statistics.mean(ranks) if ranks else math.nan for name, ranks in found.items()}

    def time_ratio(self, row: str) -> float:
        """Return the median over seeds of a step's time, as a multiple of that with equal weights; NaN if unknown."""
        times = {own.name: own.step_seconds or {} for own in self.rows}
        ratios = [own / base for seed, own in times[row].items() if (base := times[EQUAL].get(seed, 0.0)) > 0]
        return statistics.median(ratios) if ratios else math.nan

    # What it looks like

    def shown(self) -> Shown:
        """Return the table of differences, ranks and times."""
        alone = bool(self.against_single)
        heading = ["row", "lr", "Δm % to equal", "p", *(["Δm % to single"] if alone else []), "rank", "time a step"]
        grid = Grid(heading)
        for row in self.rows:
            name = row.name + of_seeds(len(self.finished(row.name)), len(self.seeds))
            if row.failed:
                grid.add(row.name, "–", "failed", *["–"] * (len(heading) - 3))
                continue
            difference, single = self.against_equal.get(row.name), self.against_single.get(row.name)
            ratio = self.time_ratio(row.name)
            cells: list[Cell | str] = [
                row.rates_text(self.directions),
                corrected(difference) if difference else nothing(row.name == EQUAL),
                "–" if difference is None else difference.p_text,
                *([corrected(single) if single else nothing(row.name == SINGLE)] if alone else []),
                "–" if math.isnan(rank := self.ranks.get(row.name, math.nan)) else f"{rank:.1f}",
                "–" if row.name == SINGLE or math.isnan(ratio) else f"{ratio:.2f}",
            ]
            grid.add(name, *cells)
        data = "test data" if self.stage == "test" else "validation data"
        title = f"Comparison on {data}, {counted(len(self.seeds), 'seed')}"
        return Shown(grid, title, " ".join(self.notes()))

    def notes(self) -> list[str]:
        """Explain the table, a sentence each."""
        said = [
            "Δm: mean relative change of the tasks' metrics, seed by seed; negative is better.",
            (
                "Brackets: 95 % intervals of Student's t, of each comparison alone; p: after Holm's correction for the "
                "number of rows; colored where it is below 0.05."
            ),
            "Time a step: as a multiple of equal weights.",
        ]
        if len(self.counted) < len(self.directions):
            said.append(f"Only the main tasks count: {', '.join(self.counted)}.")
        said += [
            f"Left out of Δm against {base}, 0 there: {', '.join(zeros)}."
            for base in (EQUAL, SINGLE)
            if (zeros := [f"{metric} of {task}" for task, metric in self.zeros(base) if task in self.counted])
        ]
        if self.stage == "val":
            said.append(
                "There are no test data: scores are on validation data, of which the learning rates have seen the "
                "scores of another seed."
            )
        if any(row.edges for row in self.rows):
            said.append("*: the chosen learning rate is at the edge of those tried.")
        return said

    def records(self) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
        """Return everything, a row each: row, quantity, task, metric, seed, mean, ends of the interval, both p.

        Quantities are ``delta_m_to_equal``, ``delta_m_to_single``, ``learning_rate``, ``mean_rank``, ``time_ratio``,
        ``task_change``, the mean ``score`` of each metric, and ``seed_score`` with its seed.
        """
        columns = ("row", "quantity", "task", "metric", "seed", "mean", "low", "high", "p", "p_corrected", "seeds")
        found: list[tuple[Any, ...]] = []
        for row in self.rows:
            name, seeds = row.name, len(self.finished(row.name))
            for quantity, own in (("to_equal", self.against_equal), ("to_single", self.against_single)):
                if (one := own.get(name)) is not None:
                    found.append(
                        (name, f"delta_m_{quantity}", "", "", "", *one.interval, one.p, one.p_corrected, seeds)
                    )
            if name not in self.chosen:
                continue
            rest = (None, None, None, None, seeds)
            for place, rate in enumerate(row.rates):
                task = list(self.directions)[place] if len(row.rates) > 1 else ""
                found.append((name, "learning_rate", task, "", "", rate, *rest))
            found.append((name, "mean_rank", "", "", "", self.ranks[name], *rest))
            if name != SINGLE and not math.isnan(self.time_ratio(name)):
                found.append((name, "time_ratio", "", "", "", self.time_ratio(name), *rest))
            for task, metrics in self.directions.items():
                if name != EQUAL:
                    found.append((name, "task_change", task, "", "", *self.task_change(name, task), None, None, seeds))
                for metric in metrics:
                    found.append((name, "score", task, metric, "", *self.score(name, task, metric), None, None, seeds))
                    found += [
                        (name, "seed_score", task, metric, seed, own[task][metric], *rest)
                        for seed, own in self.chosen[name].items()
                    ]
        return columns, found

    def figure(self) -> Figure:
        """Draw each row's Δm against equal weights with its interval.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        from lightning_mtl.tuning.comparing.picture import draw

        return draw(self)

    def print_table(self, console: Console | None = None) -> None:
        """Print the table, what it says in words, what to try next, and where the files are."""
        from lightning_mtl.tuning.comparing import advice, words

        console = console_for_lines(console)
        shown = self.shown()
        console.print(shown.grid.rich(title=shown.title, caption=shown.caption))
        for heading, lines in (("What differs", words.verdict(self)), ("What to try next", advice.advice(self))):
            console.print(f"\n{heading}", markup=False, highlight=False)
            for line in lines:
                console.print(f"- {line}", markup=False, highlight=False, soft_wrap=True)
        for path in self.files:
            console.print(str(path), markup=False, highlight=False, soft_wrap=True)
