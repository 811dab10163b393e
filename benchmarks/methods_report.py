"""What ``do_methods_work.py`` says in the end: its rows, table, significant differences, JSON and picture."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.real_problems import TRAIN_BATCH, Problem
from benchmarks.step_time import environment
from benchmarks.trials import EQUAL, SINGLE, STATIC, Method, Trial, Tuned
from lightning_mtl.metrics import Interval, delta_m, mean_rank
from lightning_mtl.paired import Difference, compare, t_interval

MOST_TASK_COLUMNS = 3
Comparison = dict[str, dict[str, Difference]]  # {what with: {row: by how much its Δm is above}}


@dataclass(frozen=True)
class Row:
    """A line of the table; all lists go over the seeds."""

    name: str
    chosen: str
    searched: dict[str, float]
    scores: list[dict[str, float]]  # {task: metric on test data}
    delta_m: list[float]
    ranks: list[float]
    reached: list[int | None]  # the step where validation is where equal weights end
    time_ratio: float | None

    def task(self, task: str) -> list[float]:
        return [scores[task] for scores in self.scores]

    def mean(self) -> float:
        """Of all tasks and seeds."""
        return statistics.mean(value for scores in self.scores for value in scores.values())

    def steps_to_reach(self) -> float | None:
        """The median over the seeds, infinite where most do not get there; None for what is not asked."""
        steps = [math.inf if step is None else step for step in self.reached]
        return statistics.median_high(steps) if steps else None


def rows_of(problem: Problem, trained: Mapping[str, Tuned], methods: Sequence[Method], tuning_seeds: int) -> list[Row]:
    """Form the rows: the single-task models together, then the models of all tasks."""
    singles = {task: trained[f"{SINGLE} {task}"] for task in problem.tasks}
    seeds = sorted(next(iter(singles.values())).trials)
    alone = [{task: found.trials[seed].test[task] for task, found in singles.items()} for seed in seeds]
    tested = {SINGLE: alone}
    tested |= {method.name: [trained[method.name].trials[seed].test for seed in seeds] for method in methods}
    better = [True] * len(problem.tasks)
    ranks = [mean_rank([list(found[i].values()) for found in tested.values()], better) for i in range(len(seeds))]
    rows = []
    for place, (name, scores) in enumerate(tested.items()):
        changes = [
            delta_m(list(found.values()), list(base.values()), better)
            for found, base in zip(scores, alone, strict=True)
        ]
        own = [of_seed[place] for of_seed in ranks]
        if name == SINGLE:
            chosen = " ".join(dict.fromkeys(f"{found.lr:g}" for found in singles.values()))
            searched = {
                f"{task} {key}": value for task, found in singles.items() for key, value in found.searched.items()
            }
            rows.append(Row(name, chosen, searched, scores, changes, own, [], None))
            continue
        tuned, equal = trained[name], trained[EQUAL]
        reached = [first_at_least(tuned.trials[seed], equal.trials[seed].validated) for seed in seeds]
        timed = seeds[tuning_seeds:] or seeds  # those that ran side by side
        ratios = [tuned.trials[seed].step_seconds / equal.trials[seed].step_seconds for seed in timed]
        chosen = f"{tuned.lr:g}" + (f" ({tuned.choice})" if tuned.choice else "")
        rows.append(Row(name, chosen, tuned.searched, scores, changes, own, reached, statistics.median(ratios)))
    return rows


def first_at_least(trial: Trial, goal: float) -> int | None:
    """The first step at which the mean metric on validation data is at the goal."""
    means = {step: statistics.mean(found.values()) for step, found in trial.curve.items()}
    return next((step for step in sorted(means) if means[step] >= goal), None)


def compared(rows: Sequence[Row]) -> Comparison:
    """Each row's Δm less that of equal weights and of the tuned fixed ones, each corrected for the number of rows."""
    values = {row.name: row.delta_m for row in rows}
    return {reference: compare(values, reference) for reference in (EQUAL, STATIC) if reference in values}


def table(problem: Problem, rows: Sequence[Row], comparison: Comparison) -> Table:
    seeds = len(rows[0].scores)
    shown = Table(
        title=f"{problem.name}: {problem.steps} steps of {TRAIN_BATCH}, {seeds} seeds, test data",
        caption=f"Δm: mean change of {problem.metric} from single-task models, negative is better. Brackets: 95 % "
        "intervals of Student's t over the seeds. p: of the paired difference of Δm from equal weights, after Holm's "
        "correction. Steps: until validation is where equal weights end, median of the seeds.",
    )
    columns = problem.tasks if len(problem.tasks) <= MOST_TASK_COLUMNS else ()
    shown.add_column("", no_wrap=True)
    for heading in ("lr", *columns, f"mean {problem.metric} %", "Δm %", "rank", "less equal", "p", "steps", "time"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        difference = comparison[EQUAL].get(row.name)
        shown.add_row(
            row.name,
            row.chosen,
            *(f"{100 * statistics.mean(row.task(task)):.1f}" for task in columns),
            f"{100 * row.mean():.2f}",
            "0" if row.name == SINGLE else bracketed(t_interval(row.delta_m)),
            f"{statistics.mean(row.ranks):.1f}",
            "-" if difference is None else bracketed(difference.interval),
            "-" if difference is None else f"{difference.p_corrected:.3f}" + ("*" if difference.significant else ""),
            steps_text(row.steps_to_reach()),
            "-" if row.time_ratio is None else f"{row.time_ratio:.2f}",
        )
    return shown


def bracketed(interval: Interval) -> str:
    return f"{interval.mean:+.2f} \\[{interval.low:+.2f}, {interval.high:+.2f}]"


def steps_text(steps: float | None) -> str:
    if steps is None:
        return "-"
    return "never" if math.isinf(steps) else str(steps)


def verdict(rows: Sequence[Row], comparison: Comparison) -> list[str]:
    """In words: what is significant, what is not, and how it goes with what others have found."""
    lines = []
    for reference, found in comparison.items():
        better = [name for name, one in found.items() if one.significant and one.interval.mean < 0]
        worse = [name for name, one in found.items() if one.significant and one.interval.mean > 0]
        alone = [name for name, one in found.items() if one.p < 0.05 and not one.significant]
        lines += [
            f"Against {reference}, {len(found)} comparisons, Holm's correction, 5 %:",
            f"  significantly better: {', '.join(better) or 'none'}",
            f"  significantly worse: {', '.join(worse) or 'none'}",
            f"  only before the correction, so no finding: {', '.join(alone) or 'none'}",
            "  not told apart: " + (", ".join(n for n in found if n not in {*better, *worse, *alone}) or "none"),
        ]
    widths = [(one.interval.high - one.interval.low) / 2 for one in comparison[EQUAL].values()]
    if widths and not math.isnan(widths[0]):
        lines.append(
            f"With these seeds a difference from equal weights is known to within ±{statistics.median(widths):.2f} "
            f"points of Δm (median; {min(widths):.2f} to {max(widths):.2f}): smaller ones may exist, unseen."
        )
    learned = [row for row in rows if row.name not in (SINGLE, EQUAL, STATIC)]
    ahead = [row.name for row in learned if _significant(comparison, EQUAL, row.name)]
    lines += [
        "Their papers report each of these methods ahead of equal weights, most on larger data and models than these.",
        "Kurin et al. (2022, arXiv:2201.04122) and Xin et al. (2022, arXiv:2209.11379) find that none beats the plain "
        f"sum, or fixed weights, once these are tuned as carefully. Here {len(ahead)} of {len(learned)} are "
        f"significantly better than equal weights{': ' + ', '.join(ahead) if ahead else ''}"
        + (
            f", and {sum(_significant(comparison, STATIC, row.name) for row in learned)} better than tuned fixed ones."
            if STATIC in comparison
            else "."
        ),
    ]
    return lines


def _significant(comparison: Comparison, reference: str, name: str) -> bool:
    found = comparison[reference][name]
    return found.significant and found.interval.mean < 0


def write(
    problem: Problem,
    rows: Sequence[Row],
    comparison: Comparison,
    folder: Path,
    *,
    seconds: float,
    suffix: str = "",
) -> list[Path]:
    """Write the figures as JSON and the picture."""
    # Not at the top: only the picture needs matplotlib.
    from benchmarks.methods_picture import draw

    folder.mkdir(parents=True, exist_ok=True)
    report = folder / f"do_methods_work_{problem.name.lower()}{suffix}.json"
    about = {
        **environment(),
        "data": problem.name,
        "tasks": problem.tasks,
        "metric": problem.metric,
        "steps": problem.steps,
        "batch": TRAIN_BATCH,
        "seeds": list(range(len(rows[0].scores))),
        "learning_rates": list(problem.learning_rates),
        "processor_seconds": round(seconds),
        "verdict": verdict(rows, comparison),
    }
    results = [as_json(row, {with_: found.get(row.name) for with_, found in comparison.items()}) for row in rows]
    report.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    picture = report.with_suffix(".png")
    draw(problem, rows, comparison[EQUAL]).savefig(picture, dpi=120)
    return [report, picture]


def as_json(row: Row, differences: Mapping[str, Difference | None]) -> dict[str, Any]:
    steps = row.steps_to_reach()
    return {
        "row": row.name,
        "chosen": row.chosen,
        "searched_on_validation": row.searched,
        "test": row.scores,
        "delta_m": {"seeds": row.delta_m, **_finite(t_interval(row.delta_m))},
        "mean_rank": statistics.mean(row.ranks),
        "steps_to_reach_equal_weights": None if steps is None or math.isinf(steps) else steps,
        "steps_to_reach_by_seed": row.reached,
        "time_per_step_over_equal_weights": row.time_ratio,
        "delta_m_less_that_of": {
            name: {**_finite(found.interval), "p": found.p, "p_after_holm": found.p_corrected}
            for name, found in differences.items()
            if found is not None
        },
    }


def _finite(interval: Interval) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in interval._asdict().items()}
