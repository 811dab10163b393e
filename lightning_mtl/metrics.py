"""How well tasks were learned together: pure functions over plain numbers."""

from __future__ import annotations

from collections.abc import Sequence


def delta_m(scores: Sequence[float], baselines: Sequence[float], higher_is_better: Sequence[bool]) -> float:
    r"""Compute the mean relative change against single-task baselines, in percent; negative is better.

    .. math:: \Delta_m = \frac{100}{M} \sum_{i=1}^{M} (-1)^{h_i} \frac{m_i - b_i}{b_i}

    with h_i = 1 where a higher score is better. Every metric counts the same, whichever task it belongs to.

    Args:
        scores: ``[M]``, the multi-task model's m_i.
        baselines: ``[M]``, the single-task models' b_i, none of them 0.
        higher_is_better: ``[M]``, h_i.

    Raises:
        ValueError: If the lengths differ, nothing is given, or a baseline is 0.

    Source: Maninis et al., Attentive Single-Tasking of Multiple Tasks, 2019, arXiv:1904.08918, which gives the change
    the other sign; the sign here is that of the later literature (Liu et al., CAGrad, 2021, arXiv:2110.14048).

    Example:
        >>> round(delta_m([0.9, 2.2], [1.0, 2.0], [True, False]), 6)
        10.0
    """
    if not len(scores) == len(baselines) == len(higher_is_better) or not len(scores):
        raise ValueError(
            f"delta_m needs as many scores as baselines and directions, at least one of each; found {len(scores)}, "
            f"{len(baselines)} and {len(higher_is_better)}."
        )
    if 0 in baselines:
        raise ValueError(f"delta_m divides by the baselines, and one of {list(baselines)} is 0; leave that metric out.")
    changes = [
        (baseline - score if higher else score - baseline) / baseline
        for score, baseline, higher in zip(scores, baselines, higher_is_better, strict=True)
    ]
    return 100 * sum(changes) / len(changes)
