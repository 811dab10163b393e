"""What a comparison says in words: what differs, and what does not."""

from __future__ import annotations

import math
import statistics

from lightning_mtl.paired import LEVEL, Difference
from lightning_mtl.tuning.comparing.cells import counted
from lightning_mtl.tuning.comparing.result import Comparison
from lightning_mtl.tuning.comparing.rows import EQUAL


def verdict(result: Comparison) -> list[str]:
    """Say what differs from equal weights, what does not, and how learning together compares with single tasks."""
    found = {name: one for name, one in result.against_equal.items() if not math.isnan(one.interval.mean)}
    where = "test" if result.stage == "test" else "validation"
    if tasks := unlabeled(result):
        return [
            f"No training has a score of {', '.join(tasks)}: do the {where} data hold labels of it?",
            *_left_out(result),
        ]
    if not found and (result.finished(EQUAL) or EQUAL not in result.chosen):
        return ["There is no row to compare with equal weights yet.", *_left_out(result)]
    if not result.finished(EQUAL):
        return ["Equal weights diverged with every seed, so that nothing can be compared with them."]
    better = {name: one for name, one in found.items() if one.significant and one.interval.mean < 0}
    worse = {name: one for name, one in found.items() if one.significant and one.interval.mean > 0}
    alone = [name for name, one in found.items() if one.p < LEVEL and not one.significant]
    same = [name for name in found if name not in {*better, *worse, *alone}]
    said = [
        (
            f"On {where} data, against equal weights, {counted(len(found), 'row')}, 5 % level after Holm's correction: "
            f"{len(better)} better, {len(worse)} worse, {len(found) - len(better) - len(worse)} not told apart."
        )
    ]
    said += [f"Better than equal weights: {_listed(better)}."] if better else ["No row is better than equal weights."]
    said += [f"Worse than equal weights: {_listed(worse)}."] if worse else []
    if same:
        said.append(f"Not told apart from equal weights: {', '.join(same)}.")
    if alone:
        said.append(f"Below 5 % only before the correction, so no finding: {_listed({n: found[n] for n in alone})}.")
    widths = [(one.interval.high - one.interval.low) / 2 for one in found.values()]
    if not math.isnan(widths[0]):
        said.append(
            f"These {len(result.seeds)} seeds show differences to within ±{points(statistics.median(widths))} points "
            f"of Δm (median over the rows; {points(min(widths))} to {points(max(widths))}); smaller ones may exist, "
            "unseen."
        )
    else:
        said.append("One seed gives no interval: nothing can be told apart. Take five or more.")
    if (one := result.against_single.get(EQUAL)) is not None and not math.isnan(one.interval.mean):
        said.append(f"Learning together, with equal weights, against each task alone: {_against(one)}.")
    for row in result.rows:
        finished = len(result.finished(row.name))
        if not row.failed and finished < len(row.scores):
            said.append(f"{row.name} diverged with {len(row.scores) - finished} of {len(row.scores)} seeds.")
    return said + _left_out(result)


def unlabeled(result: Comparison) -> list[str]:
    """The tasks that no training has a finite score of, where some other task has one."""
    scores = [own for row in result.chosen.values() for own in row.values()]
    known = {task for own in scores for task, found in own.items() if any(map(math.isfinite, found.values()))}
    return [task for task in result.directions if task not in known] if known else []


def _left_out(result: Comparison) -> list[str]:
    said = [f"{row.name} failed: {row.failed}" for row in result.rows if row.failed]
    said += [f"{name} is left out: {why}." for name, why in (result.left_out or {}).items()]
    if result.unfinished:
        said.append(f"{result.unfinished} trainings are missing: the same command goes on.")
    return said


def _listed(found: dict[str, Difference]) -> str:
    ordered = sorted(found.items(), key=lambda pair: pair[1].interval.mean)
    return "; ".join(f"{name} ({numbers(one)})" for name, one in ordered)


def numbers(one: Difference) -> str:
    """Write a difference with its interval and its corrected p."""
    mean, low, high = one.interval
    ends = "" if math.isnan(low) else f" [{low:+.1f}, {high:+.1f}]"
    p = one.p_text
    p = f"p {p}" if p.startswith(("<", "≥")) else f"p = {p}"
    return f"Δm {mean:+.1f} %{ends}, {p}"


def _against(one: Difference) -> str:
    if not one.significant:
        beyond = one.interval.low > 0 or one.interval.high < 0
        why = "; the interval is of this comparison alone, p is corrected for all" if beyond else ""
        return f"not told apart ({numbers(one)}{why})"
    return f"{'better' if one.interval.mean < 0 else 'worse'} ({numbers(one)})"


def points(value: float) -> str:
    """Write points of Δm to two digits."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
