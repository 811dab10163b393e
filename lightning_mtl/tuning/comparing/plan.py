"""The plan of a comparison: from the outcomes so far to the trainings that are wanted next, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_mtl.transfer.finished import Directions, TaskScores, chosen_scores

MOST_WIDENINGS = 3
Purpose = Literal["choose", "compare", "monitor"]
Scores = Mapping[str, TaskScores | None]
"""``{key of a training: its scores on validation data}``; None for one that ended with an error."""


@dataclass(frozen=True)
class Line:
    """Holds what makes one choice: a row of the comparison, or one task of the row of single tasks.

    Args:
        row: The row's key.
        variants: How many sets of fixed weights it has to choose from; 1 for every other row.
        directions: The scores that it is chosen by, and whether higher is better.
        task: The task that is trained alone.
    """

    row: str
    directions: Directions
    variants: int = 1
    task: str | None = None


@dataclass(frozen=True)
class Candidate:
    """Holds what can be chosen for a line: one of its variants, and a learning rate."""

    variant: int
    rate: float


@dataclass(frozen=True)
class Training:
    """Names one training; its key stands for it in the study."""

    purpose: Purpose
    row: str
    task: str | None
    candidate: Candidate
    seed: int

    @property
    def key(self) -> str:
        """Return the training's name in the study, the same for the same training in every process."""
        alone = "" if self.task is None else f" task={self.task}"
        chosen = f"variant={self.candidate.variant} lr={self.candidate.rate!r}"
        return f"{self.purpose} {self.row}{alone} {chosen} seed={self.seed}"


@dataclass(frozen=True)
class Choice:
    """Holds what validation data chose for a line.

    Args:
        candidate: The choice; None where every training ended with an error.
        tried: The learning rates that were tried with the chosen variant, ascending.
        edge: Whether the rate is still the lowest, or the highest, of those tried.
    """

    candidate: Candidate | None
    tried: tuple[float, ...] = ()
    edge: Literal["", "lowest", "highest"] = ""


def regrets(found: Mapping[Candidate, TaskScores | None], directions: Directions) -> dict[Candidate, float]:
    r"""Compute how far each candidate is behind the best, relative to it: the mean over tasks and metrics.

    .. math:: r_c = \frac{1}{M} \sum_{i=1}^{M} \frac{|m_{ci} - b_i|}{|b_i|}, \qquad b_i = \text{best}_c\ m_{ci}

    It has no unit, so that losses, errors and accuracies count alike. A candidate that diverged, or ended with an
    error, is infinitely far behind. Where the best is 0, the largest score takes its place as the divisor.

    Example:
        >>> slow, fast = Candidate(0, 0.1), Candidate(0, 0.2)
        >>> regrets({slow: {"a": {"loss": 3.0}}, fast: {"a": {"loss": 2.0}}}, {"a": {"loss": False}})[slow]
        0.5
    """
    scores = {candidate: chosen_scores(own, directions) for candidate, own in found.items() if own is not None}
    finite = {
        candidate: own
        for candidate, own in scores.items()
        if all(math.isfinite(value) for metrics in own.values() for value in metrics.values())
    }
    totals = {candidate: 0.0 if candidate in finite else math.inf for candidate in found}
    cells = [(task, metric, higher) for task, metrics in directions.items() for metric, higher in metrics.items()]
    for task, metric, higher in cells:
        values = {candidate: own[task][metric] for candidate, own in finite.items()}
        if not values:
            break
        best = max(values.values()) if higher else min(values.values())
        unit = abs(best) or max(map(abs, values.values())) or 1.0
        for candidate, value in values.items():
            totals[candidate] += abs(value - best) / unit / len(cells)
    return totals


@dataclass(frozen=True)
class Search:
    """Holds the trainings that a line's choice rests on, and the choice, None while some are missing."""

    trainings: tuple[Training, ...]
    choice: Choice | None


def search(line: Line, rates: Sequence[float], seed: int, known: Scores) -> Search:
    """Choose a line's learning rate and variant, as far as the outcomes allow it.

    The candidate with the least regret is chosen, the first of equals; where all diverged, the lowest rate. Where its
    rate is the lowest or the highest of those tried with its variant, one more is tried on that side, at the same
    ratio, at most three times.

    Args:
        line: The row, or the task of a row.
        rates: The learning rates that every line begins with, ascending.
        seed: The seed that is there for the choice alone.
        known: What is known so far.
    """
    candidates = [Candidate(variant, rate) for variant in range(line.variants) for rate in rates]
    if len(candidates) == 1:  # nothing to choose from
        return Search((), Choice(candidates[0], tuple(rates)))
    while True:
        trainings = [Training("choose", line.row, line.task, one, seed) for one in candidates]
        if any(training.key not in known for training in trainings):
            return Search(tuple(trainings), None)
        found = {training.candidate: known[training.key] for training in trainings}
        if all(scores is None for scores in found.values()):
            return Search(tuple(trainings), Choice(None))
        behind = regrets(found, line.directions)
        best = min(behind, key=lambda one: (behind[one], one.rate if math.isinf(behind[one]) else 0.0))
        tried = tuple(sorted(one.rate for one in found if one.variant == best.variant))
        if len(rates) == 1 or tried[0] < best.rate < tried[-1]:
            return Search(tuple(trainings), Choice(best, tried))
        edge: Literal["lowest", "highest"] = "lowest" if best.rate == tried[0] else "highest"
        if len(candidates) == line.variants * len(rates) + MOST_WIDENINGS:
            return Search(tuple(trainings), Choice(best, tried, edge))
        candidates.append(Candidate(best.variant, _beyond(rates, tried, edge)))


def _beyond(rates: Sequence[float], tried: Sequence[float], edge: str) -> float:
    """The next rate on a side, at the grid's own ratio there; counted from the grid, so that rounding adds up not."""
    first, inner = (rates[0], rates[1]) if edge == "lowest" else (rates[-1], rates[-2])
    beyond = sum(rate < rates[0] for rate in tried) if edge == "lowest" else sum(rate > rates[-1] for rate in tried)
    return float(f"{first * (first / inner) ** (beyond + 1):.3g}")


def rounded(rate: float) -> float:
    """Round a learning rate to four digits.

    Example:
        >>> rounded(0.01 * 10**0.5)
        0.03162
    """
    return float(f"{rate:.4g}")


def rates_around(rate: float) -> tuple[float, ...]:
    """Return three learning rates around one, at a ratio of the root of 10.

    Example:
        >>> rates_around(0.01)
        (0.003162, 0.01, 0.03162)
    """
    return tuple(rounded(rate * 10 ** (power / 2)) for power in (-1, 0, 1))


@dataclass(frozen=True)
class Plan:
    """Holds what a comparison trains.

    Args:
        lines: What makes a choice each, in the order of the table.
        rates: The learning rates to begin with, ascending.
        tuning_seed: The seed of the choice.
        seeds: The seeds that are compared.
        monitored: The row that is trained once more with monitors; None for none.
    """

    lines: tuple[Line, ...]
    rates: tuple[float, ...]
    tuning_seed: int
    seeds: tuple[int, ...]
    monitored: str | None = None

    def searches(self, known: Scores) -> list[tuple[Line, Search]]:
        """Return how far each line's choice has come."""
        return [(line, search(line, self.rates, self.tuning_seed, known)) for line in self.lines]

    def trainings(self, known: Scores) -> list[Training]:
        """Return all trainings that are known to belong to the comparison by now, done or not, in their order.

        Choices come first. Then go the seeds one by one, all rows of a seed side by side, so that what is compared in
        time runs under the same load.
        """
        found = self.searches(known)
        wanted = [training for _, own in found for training in own.trainings]
        made = [(line, own.choice.candidate) for line, own in found if own.choice is not None]
        chosen = [(line, candidate) for line, candidate in made if candidate is not None]
        for seed in self.seeds:
            wanted += [Training("compare", line.row, line.task, candidate, seed) for line, candidate in chosen]
        wanted += [
            Training("monitor", line.row, None, candidate, self.seeds[0])
            for line, candidate in chosen
            if line.row == self.monitored
        ]
        return wanted

    def missing(self, known: Scores) -> list[Training]:
        """Return the trainings that are wanted and not known, in their order."""
        return [training for training in self.trainings(known) if training.key not in known]

    def expected(self, known: Scores) -> int:
        """Return how many trainings there will be, if no grid is widened any more."""
        unsettled = [line for line, own in self.searches(known) if own.choice is None]
        monitored = any(line.row == self.monitored for line in unsettled)
        return len(self.trainings(known)) + len(unsettled) * len(self.seeds) + monitored
