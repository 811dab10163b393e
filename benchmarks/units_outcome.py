"""What the trainings of ``units.py`` say: errors over scales, differences, and what random weights are worth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.units_problems import Problem
from benchmarks.units_rows import DECADES, EQUAL, SIMPLEX, STANDARDIZED, TUNED, TUNING_SEED
from lightning_mtl.metrics import Interval
from lightning_mtl.paired import Difference, compare_with_zero, t_interval

Result = Mapping[str, Any]
Label = tuple[str, str]
"""A row's name, and its optimizer."""


@dataclass(frozen=True)
class Meeting:
    """How many sets of random weights a method is worth; None for more than were drawn.

    Args:
        told_apart: The least n from which the best of n is not known to be worse.
        ahead: The least n whose best is at least as good in the mean.
    """

    told_apart: int | None
    ahead: int | None


@dataclass
class Outcome:
    """What is trained so far.

    Args:
        problem: The data.
        scales: What the loss was multiplied by.
        curves: The results of all rows' chosen trainings.
        draws: ``{(kind, n): results}`` of the best of n sets of random weights, one a seed.
        tuned: Those of the best set of all.
        results: All results, those of the choices included.
    """

    problem: Problem[Any]
    scales: Sequence[float]
    curves: list[Result] = field(default_factory=list)
    draws: dict[tuple[str, int], list[Result]] = field(default_factory=dict)
    tuned: list[Result] = field(default_factory=list)
    results: Sequence[Result] = ()

    def table(self) -> dict[Label, dict[float, dict[int, float]]]:
        """Collect the test errors ``{row: {scale: {seed: error}}}``; those of flat rows stand at each scale."""
        found: dict[Label, dict[float, dict[int, float]]] = {}
        for one in self.curves:
            for scale in self.scales if one["row"] == STANDARDIZED else (one["scale"],):
                cell = found.setdefault((one["row"], one["optimizer"]), {}).setdefault(scale, {})
                cell[one["seed"]] = error_of(one)
        if self.tuned:
            errors = {one["seed"]: error_of(one) for one in self.tuned}
            found[TUNED, "Adam"] = dict.fromkeys(self.scales, errors)
        return found

    def against(self, base: Label, scale: float) -> dict[Label, Difference]:
        """Compare each row with one, seed by seed, at a scale, corrected for the number of rows."""
        table = self.table()
        if scale not in table.get(base, {}):
            return {}
        rows = {label: difference(by[scale], table[base][scale]) for label, by in table.items() if scale in by}
        found = compare_with_zero({"\n".join(label): own for label, own in rows.items() if label != base})
        return {(name, optimizer): one for key, one in found.items() for name, optimizer in [key.split("\n")]}

    def best_of(self, kind: str) -> dict[int, dict[int, float]]:
        """The test errors ``{n: {seed: error}}`` of the best of n sets of random weights."""
        return {
            n: {one["seed"]: error_of(one) for one in results}
            for (found, n), results in sorted(self.draws.items())
            if found == kind
        }

    def meetings(self, kind: str) -> dict[str, Meeting]:
        """Find the number of random weights that each row with Adam is worth, at scale 1."""
        best, found = self.best_of(kind), {}
        for (row, optimizer), by in self.table().items():
            if optimizer == "Adam" and row not in (EQUAL, TUNED) and 1.0 in by and best:
                behind = {n: t_interval(difference(own, by[1.0])) for n, own in best.items()}
                found[row] = Meeting(
                    next((n for n, one in behind.items() if not one.low > 0), None),
                    next((n for n, one in behind.items() if one.mean <= 0), None),
                )
        return found

    def edges(self) -> list[str]:
        """Say which choices lie at the edge of the rates that were tried."""
        said = []
        for one in {(r["row"], r["optimizer"], r["scale"], r["variant"], r["lr"]) for r in self._chosen()}:
            row, optimizer, scale, variant, rate = one
            tried = sorted(
                r["lr"]
                for r in self.results
                if (r["row"], r["optimizer"], r["scale"], r["variant"], r["seed"])
                == (row, optimizer, scale, variant, TUNING_SEED)
            )
            if tried and rate in (tried[0], tried[-1]):
                said.append(f"{row}, {optimizer}, times {scale:g}: {rate:g} of {', '.join(f'{r:g}' for r in tried)}")
        return sorted(said)

    def _chosen(self) -> list[Result]:
        return [*self.curves, *(one for results in self.draws.values() for one in results)]


def error_of(result: Result) -> float:
    """A result's error on test data; infinite where it diverged."""
    return math.inf if result["test"] is None else float(result["test"])


def difference(errors: Mapping[int, float], base: Mapping[int, float]) -> list[float]:
    """The differences of the seeds that both have finished."""
    common = [seed for seed in errors if seed in base and math.isfinite(errors[seed] + base[seed])]
    return [errors[seed] - base[seed] for seed in common]


def show(outcome: Outcome) -> None:
    """Print the mean errors at each scale, what differs from equal and from standardized ones, and the budget."""
    problem, table = outcome.problem, outcome.table()
    seeds = {len(errors) for by in table.values() for errors in by.values()}
    print(f"\n{problem.error}, mean of {'/'.join(map(str, sorted(seeds)))} seeds; the loss of {problem.scaled} times")
    print(f"{'':36}" + "".join(f"{scale:>9g}" for scale in outcome.scales) + "   at 1, less equal weights   less tuned")
    equal, tuned = (outcome.against((row, "Adam"), 1.0) for row in (EQUAL, TUNED))
    for label, by in sorted(table.items(), key=lambda item: item[0][1]):
        means = [statistics.mean(by[scale].values()) if scale in by else math.nan for scale in outcome.scales]
        print(
            f"{label[0]:30} {label[1]:5}"
            + "".join(f"{mean:9.2f}" for mean in means)
            + "".join(f"   {interval_text(one.get(label))}" for one in (equal, tuned))
        )
    for kind in (SIMPLEX, DECADES):
        for n, errors in outcome.best_of(kind).items():
            print(f"best of {n:2} {kind:30} {interval_text_of(t_interval(list(errors.values())))}")
        for row, one in outcome.meetings(kind).items():
            print(f"    {row:28} as good in the mean from n = {one.ahead}, not told apart from n = {one.told_apart}")
    for line in outcome.edges():
        print(f"at the edge of the rates tried: {line}")


def interval_text(found: Difference | None) -> str:
    """A difference and half its interval, with a star where it is significant."""
    if found is None:
        return f"{'':19}"
    return f"{interval_text_of(found.interval)}{' *' if found.significant else '  '}"


def interval_text_of(interval: Interval) -> str:
    """A mean and half its interval."""
    return f"{interval.mean:+8.2f} ± {interval.high - interval.mean:<6.2f}"
