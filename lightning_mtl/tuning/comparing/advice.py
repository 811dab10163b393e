"""What a comparison advises to try next, each piece with the figure that it rests on."""

from __future__ import annotations

import math
import statistics

import torch

from lightning_mtl.monitors.grouping import best_grouping
from lightning_mtl.paired import LEVEL, compare_with_zero
from lightning_mtl.tuning.comparing.result import Comparison
from lightning_mtl.tuning.comparing.rows import EQUAL, FIXED, INITIAL, SINGLE, STANDARDIZED
from lightning_mtl.tuning.comparing.words import numbers, points, unlabeled

# Above it, one task's gradient drowns another's; below, lengths are much alike.
FAR_APART = 10.0
# Pairs of gradients of random directions conflict in half of all steps; tasks that learn together rarely reach a third.
MUCH_CONFLICT, LITTLE_CONFLICT = 1 / 3, 0.1
FELT = 0.05  # of what a task's own step does for it
WIDE = 1.0  # points of Δm
MOST_SEEDS = 100
DIRECTIONAL = ("PCGrad", "CAGrad", "UPGrad", "NashMTL", "AlignedMTL")


def advice(result: Comparison) -> list[str]:
    """Say what to try next, each piece with the figure that it rests on."""
    found = {name: one for name, one in result.against_equal.items() if not math.isnan(one.interval.mean)}
    if unlabeled(result):
        return []
    better = sorted(
        (name for name, one in found.items() if one.significant and one.interval.mean < 0 and name != SINGLE),
        key=lambda name: found[name].interval.mean,
    )
    said: list[str] = []
    if better:
        said += _to_take(result, better)
    elif len(result.seeds) == 1:
        said.append("Take five seeds or more (--seeds): a single one tells nothing apart.")
    elif alone := [
        name
        for name, one in found.items()
        if one.p < LEVEL and not one.significant and one.interval.mean < 0 and name != SINGLE
    ]:
        said.append(
            f"Take more seeds (--seeds) before you choose: {', '.join(alone)} would be ahead of equal weights if "
            "nothing else had been compared."
        )
    elif found.keys() - {SINGLE}:
        said.append(
            "Keep equal weights: no other way of learning together is ahead of them beyond noise, and none is cheaper "
            "or simpler."
        )
    said += _of_scales(result, better) + _of_conflict(result, better) + _of_affinity(result)
    said += _of_single_tasks(result, better)
    for row in result.rows:
        said += [f"{row.name}: {edge}; try others with lrs (--lrs)." for edge in row.edges]
        if not row.failed and row.scores and len(result.finished(row.name)) < len(row.scores):
            said.append(
                f"{row.name} diverged in {len(row.scores) - len(result.finished(row.name))} of {len(row.scores)} "
                "seeds: try a lower learning rate (--lrs), or gradient_clip_val."
            )
    halves = [(one.interval.high - one.interval.low) / 2 for one in found.values()]
    widths = [half for half in halves if not math.isnan(half)]
    apart = all(one.significant for one in found.values())
    if widths and not apart and (wide := statistics.median(widths)) > WIDE:
        needed = seeds_for(WIDE, wide, len(result.seeds))
        number = f"roughly {needed}" if needed <= MOST_SEEDS else f"more than {MOST_SEEDS}"
        said.append(
            f"Intervals are ±{points(wide)} points wide: to see a difference of {WIDE:g} point takes {number} seeds "
            "(--seeds)."
        )
    return said


def _to_take(result: Comparison, better: list[str]) -> list[str]:
    """The row that is furthest ahead, and those that are not told apart from it, of which the cheapest is named."""
    best, *others = better
    said = [
        (
            f"Take {best}: it is the furthest ahead of equal weights ({numbers(result.against_equal[best])})."
            f"{_how(result, best)}"
        )
    ]
    own = result.changes(best, EQUAL, result.counted)
    behind = {
        name: [
            change - own[seed] for seed, change in result.changes(name, EQUAL, result.counted).items() if seed in own
        ]
        for name in others
    }
    alike = [name for name, one in compare_with_zero(behind).items() if not one.significant]
    if alike:
        times = {name: result.time_ratio(name) for name in (best, *alike)}
        cheapest = min(times, key=lambda name: math.inf if math.isnan(times[name]) else times[name])
        said.append(
            f"Not told apart from {best}: {', '.join(alike)}. A step of {cheapest} is the cheapest of these, "
            f"{times[cheapest]:.2f} times that with equal weights.{_how(result, cheapest) if cheapest != best else ''}"
        )
    return said


def seeds_for(margin: float, found: float, seeds: int) -> int:
    """Estimate how many seeds make an interval's half as wide as a margin, from the half found with so many seeds.

    Example:
        >>> seeds_for(1.0, 1.0, 5), seeds_for(0.5, 1.0, 5)
        (5, 13)
    """
    from scipy.stats import t as student  # here, since scipy.stats takes a second to import

    deviation = found * math.sqrt(seeds) / float(student.ppf(1 - LEVEL / 2, seeds - 1))
    for number in range(2, MOST_SEEDS + 1):
        if float(student.ppf(1 - LEVEL / 2, number - 1)) * deviation / math.sqrt(number) <= margin * (1 + 1e-9):
            return number
    return MOST_SEEDS + 1


def _how(result: Comparison, row: str) -> str:
    weights = next(own.variant for own in result.rows if own.name == row)
    return {
        STANDARDIZED: " Write Task(standardize=True) for the regressions.",
        INITIAL: ' Write Task(loss_scale="initial") for the tasks.',
        FIXED: f" Give StaticWeights these weights: {weights}.",
    }.get(row, "")


def _extremes(result: Comparison) -> tuple[str, str, float] | None:
    """The tasks of the longest and the shortest median gradient, and how many times as long the longer is."""
    norms = {task: norm for task, norm in ((result.figures or {}).get("norms") or {}).items() if norm > 0}
    if len(norms) < 2:
        return None
    large, small = max(norms, key=norms.__getitem__), min(norms, key=norms.__getitem__)
    return large, small, norms[large] / norms[small]


def _of_scales(result: Comparison, better: list[str]) -> list[str]:
    if (extremes := _extremes(result)) is None:
        return []
    large, small, ratio = extremes
    if ratio < FAR_APART:
        return [
            (
                f"With equal weights the tasks' gradients are of much the same length (median of {large} over that of "
                f"{small}: {ratio:.2f}): there is little to gain from evening scales out."
            )
        ]
    times = f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3g}"
    figure = f"With equal weights the median gradient of {large} is {times} times as long as that of {small}"
    helped = [name for name in better if name in (STANDARDIZED, INITIAL, FIXED)]
    if helped:
        return [f"{figure}: that is what {', '.join(helped)} mend."]
    return [
        (
            f"{figure}: {small} hardly moves what is shared. Try Task(standardize=True) for regressions, "
            'Task(loss_scale="initial" or "running"), or a method that does not depend on scales (IMTLG, NashMTL, '
            "ScaleInvariant)."
        )
    ]


def _of_conflict(result: Comparison, better: list[str]) -> list[str]:
    share = (result.figures or {}).get("conflict")
    if share is None:
        return []
    figure = f"Gradients conflict in {100 * share:.0f} % of the pairs of tasks and measured steps"
    if share > MUCH_CONFLICT:
        tried = [name for name in DIRECTIONAL if name in result.against_equal]
        rest = ", ".join(name for name in DIRECTIONAL if name not in tried)
        if not tried or set(tried) & set(better):
            return [f"{figure}: methods that look at directions may help, such as {rest}."]
        return [
            (
                f"{figure}. Of the methods against that, {', '.join(tried)} did not help here; others are {rest}, or "
                "less sharing (MMoE, PLE, groups of tasks by TaskAffinity)."
            )
        ]
    if share < LITTLE_CONFLICT:
        return [f"{figure}: methods against conflict have little to do here."]
    return [f"{figure}: some, as is usual; methods against conflict may help a little."]


def _of_affinity(result: Comparison) -> list[str]:
    """Which tasks a step for one helps or hurts; not where scales lie far apart, which would speak of them alone."""
    figures, extremes = result.figures or {}, _extremes(result)
    if "affinity" not in figures or extremes is None or extremes[2] >= FAR_APART:
        return []
    tasks, affinity = figures["tasks"], torch.tensor(figures["affinity"], dtype=torch.float64)
    beside = affinity.clone().fill_diagonal_(math.inf)
    worst = int(beside.argmin())
    acting, on = tasks[worst // len(tasks)], tasks[worst % len(tasks)]
    share = 100 * float(beside.min())
    said = f"a step for {acting} {'lowers' if share >= 0 else 'raises'} the loss of {on} by {abs(share):.0f} % of what "
    said += f"{on}'s own step lowers it by"
    groups = best_grouping(affinity, len(tasks))
    if share >= -100 * FELT or len(groups) == 1:
        return [f"Affinity is no reason to train tasks apart: the least is that {said}."]
    named = "; ".join(", ".join(tasks[task] for task in group) for group in groups)
    return [
        (
            f"By affinity some tasks hold others back: {said}. Those that help each other: {named}. Try a module for "
            "each of these groups, or MMoE or PLE, and compare again."
        )
    ]


def _of_single_tasks(result: Comparison, better: list[str]) -> list[str]:
    name = better[0] if better else EQUAL
    if name in (STANDARDIZED, INITIAL) and result.against_single:
        return [
            (
                f"The single tasks were trained without what {name} has: whether learning together helps is seen once "
                "the configuration has it for all rows."
            )
        ]
    one = result.against_single.get(name)
    if one is None or not one.significant:
        return []
    if one.interval.mean > 0:
        return [
            (
                f"Even {name} is behind each task trained alone ({numbers(one)}): give the tasks more of their own (a "
                "larger trunk, MMoE, PLE, soft sharing), or train groups of them apart (TaskAffinity)."
            )
        ]
    return [f"Learning together helps: {name} is ahead of each task trained alone ({numbers(one)})."]
