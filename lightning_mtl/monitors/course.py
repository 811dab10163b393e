"""Describes a task's course through a training by its curves: speed, noise and fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mtl.monitors.tables import Grid

# Shares of the progress from the first loss to the last, or from the first validation to the best. What they decide is
# a word in a table, not a step of the training.
STILL_FALLING = 0.05
NOISY = 0.1
WORSE_THAN_BEST = 0.1
HARDLY_MOVED = 0.1
LARGE_GAP = 0.5

Points = Sequence[tuple[int, float]]
"""Values of one curve, each with its optimizer step."""


@dataclass(frozen=True)
class Course:
    """Summarizes one task's curves.

    Attributes:
        task: Its name.
        steps_to_fraction: The step at which the curve had made the asked fraction of its way; None if it got no better.
        late_loss: The mean training loss over the last quarter of the steps.
        late_std: Its standard deviation there.
        train_loss: The last epoch's mean training loss, if an epoch was finished.
        val_loss: The last validation's loss, if there was one.
        words: What is remarkable about it; ``("converged",)`` if nothing is.

    Example:
        >>> Course("age", 40, late_loss=0.5, late_std=0.01, train_loss=0.5, val_loss=0.75, words=("converged",)).gap
        0.25
    """

    task: str
    steps_to_fraction: int | None
    late_loss: float
    late_std: float
    train_loss: float | None
    val_loss: float | None
    words: tuple[str, ...]

    @property
    def gap(self) -> float | None:
        """Return by how much the validation loss exceeds the training loss."""
        return None if self.train_loss is None or self.val_loss is None else self.val_loss - self.train_loss


def steps_to_fraction(
    points: Points, fraction: float, *, window: int = 1, higher_is_better: bool = False
) -> int | None:
    """Find the first step at which a curve has made a fraction of the way from its beginning to its end.

    Beginning, end and curve are means over ``window`` points, so that no single batch decides.

    Args:
        points: The curve.
        fraction: Of the way, in (0, 1].
        window: How many points a mean is taken over.
        higher_is_better: Whether the curve is to rise.

    Returns:
        The step; None if the curve ends no better than it began.

    Example:
        >>> steps_to_fraction([(0, 5.0), (10, 3.0), (20, 1.5), (30, 1.0)], 0.8)
        20
    """
    if len(points) < 2:
        return None
    sign = -1.0 if higher_is_better else 1.0
    values = torch.tensor([sign * value for _, value in points], dtype=torch.float64)
    window = min(window, len(values) // 2)
    smooth = values.unfold(0, window, 1).mean(1)
    first, last = smooth[0], smooth[-1]
    if not last < first:
        return None
    way = first - last
    reached = (smooth <= first - fraction * way + 1e-9 * way).nonzero()  # more than rounding, less than a step
    return points[int(reached[0]) + window - 1][0]


def describe_course(
    task: str, losses: Points, train: Points, val: Points, fraction: float, metric: tuple[Points, bool] | None = None
) -> Course:
    """Summarize a task's curves in numbers and words.

    The words, and what they stand for:

    - *got worse*: the late training loss is above the first; *diverged*: it is more than twice it.
    - *hardly learned*: it fell by less than 10 % of the first.
    - *still falling*: within the last quarter of the steps it fell by more than 5 % of its whole way, and by more than
      two standard errors.
    - *noisy*: its standard deviation there is more than 10 % of the whole way.
    - *overfitting since step s*: the validation's loss was best at s and has risen since by more than 10 % of its way
      there, or of its best value if that is more, while the training loss fell.
    - *large gap*: the validation's loss exceeds the training's by more than half of the training's whole way.

    Args:
        task: The task.
        losses: Training losses at single steps.
        train: Mean training losses of epochs.
        val: Losses of validations.
        fraction: As in :func:`steps_to_fraction`.
        metric: A validation metric to judge the speed by instead, and whether higher is better.

    Example:
        >>> losses = [(step, 1.0 if step < 10 else 0.2) for step in range(40)]
        >>> course = describe_course("age", losses, train=[(20, 0.6), (40, 0.2)], val=[], fraction=0.9)
        >>> course.steps_to_fraction, course.words
        (11, ('converged',))
    """
    window = max(1, len(losses) // 20)
    values = torch.tensor([value for _, value in losses], dtype=torch.float64)
    late = values[-max(1, len(values) // 4) :] if len(values) else values.new_tensor([torch.nan])
    curve, higher = metric or (losses, False)
    speed = steps_to_fraction(curve, fraction, window=1 if metric else window, higher_is_better=higher)
    course = Course(
        task,
        speed,
        float(late.mean()),
        float(late.std(correction=0)),
        train[-1][1] if train else None,
        val[-1][1] if val else None,
        (),
    )
    words = _words(course, values, late, window)
    if (best := _overfits(losses, val)) is not None:
        words.append(f"overfitting since step {best}")
    way = float(values[:window].mean()) - course.late_loss if len(values) else math.nan
    if course.gap is not None and way > 0 and course.gap > LARGE_GAP * way:
        words.append("large gap")
    return Course(**{**vars(course), "words": tuple(words) or ("converged",)})


def _words(course: Course, values: Tensor, late: Tensor, window: int) -> list[str]:
    if len(values) < 4:
        return ["too few measurements"]
    first = float(values[:window].mean())
    way = first - course.late_loss
    if way < 0:
        return ["diverged" if -way > abs(first) else "got worse"]
    words = []
    if way < HARDLY_MOVED * abs(first):
        words.append("hardly learned")
    half = max(1, len(late) // 2)
    fall = float(late[:half].mean() - late[-half:].mean())
    by_chance = 2 * math.sqrt(2 / half) * float(late.std(correction=0))  # two standard errors of the difference
    if fall > max(STILL_FALLING * way, by_chance):
        words.append("still falling")
    if course.late_std > NOISY * way:
        words.append("noisy")
    return words


def _overfits(losses: Points, val: Points) -> int | None:
    """The step of the best validation, if the loss has risen since while the training loss fell."""
    if len(val) < 2:
        return None
    best_step, best = min(val, key=lambda point: point[1])
    way = max(val[0][1] - best, abs(best))
    if not val[-1][1] - best > WORSE_THAN_BEST * way:
        return None
    before = [value for step, value in losses if step <= best_step]
    after = [value for step, value in losses if step > best_step]
    near = max(1, min(len(before), len(after)) // 2)
    falls = before and after and sum(after[-near:]) < sum(before[-near:])
    return best_step if falls else None


def table_of(courses: Sequence[Course], fraction: float) -> str:
    """Write courses as a Markdown table whose columns are aligned, so that a console can show it, too.

    Example:
        >>> print(table_of([Course("a", 40, 0.5, 0.01, 0.5, None, ("converged",))], 0.9))
        | task | steps to 90 % | late loss | late std | train loss | val loss | gap | course    |
        | ---- | ------------- | --------- | -------- | ---------- | -------- | --- | --------- |
        | a    | 40            | 0.5       | 0.01     | 0.5        | -        | -   | converged |
    """
    numbers = ["late loss", "late std", "train loss", "val loss", "gap"]
    header = ["task", f"steps to {100 * fraction:g} %", *numbers, "course"]
    grid = Grid(header, left=range(len(header)))
    for course in courses:
        values = (course.late_loss, course.late_std, course.train_loss, course.val_loss, course.gap)
        steps = "-" if course.steps_to_fraction is None else str(course.steps_to_fraction)
        grid.add(course.task, steps, *map(_short, values), ", ".join(course.words))
    return grid.markdown()


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
