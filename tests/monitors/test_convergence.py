"""What is said of curves whose story is known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from lightning_mtl.monitors import Convergence, convergence, describe_course
from lightning_mtl.monitors.convergence import LossHistory
from lightning_mtl.monitors.course import steps_to_fraction
from tests.small import TASKS, batches, binary, small
from tests.training import Memory, fit, loader

STEPS = range(0, 1000, 10)


def falling(rate: float = 0.01, noise: float = 0.0) -> list[tuple[int, float]]:
    generator = torch.Generator().manual_seed(0)
    return [(s, 2 * math.exp(-rate * s) + 0.5 + noise * float(torch.randn((), generator=generator))) for s in STEPS]


@pytest.mark.parametrize(
    ("losses", "val", "words"),
    [
        (falling(), [(500, 0.6), (990, 0.55)], ("converged",)),
        (falling(0.002), [(500, 1.3), (990, 0.9)], ("still falling",)),
        (falling(noise=0.4), [], ("noisy",)),
        (falling(), [(300, 0.9), (600, 0.7), (990, 0.9)], ("overfitting since step 600",)),
        (falling(), [(500, 2.1), (990, 2.0)], ("large gap",)),
        (falling(), [(500, 1.0), (990, 2.2)], ("overfitting since step 500", "large gap")),
        ([(s, 1.0 - 1e-5 * s) for s in STEPS], [], ("hardly learned", "still falling")),
        ([(s, 1.0 + 1e-3 * s) for s in STEPS], [(500, 1.5), (990, 2.0)], ("got worse",)),
        ([(s, 1.0 + s) for s in STEPS], [], ("diverged",)),
        ([(0, 1.0), (10, 0.5)], [], ("too few measurements",)),
        ([], [], ("too few measurements",)),
    ],
)
def test_words(losses: list[tuple[int, float]], val: list[tuple[int, float]], words: tuple[str, ...]) -> None:
    train = [(990, losses[-1][1])] if losses else []
    assert describe_course("a", losses, train, val, 0.9).words == words


def test_numbers() -> None:
    course = describe_course("a", falling(), [(500, 0.7), (990, 0.5)], [(990, 0.55)], 0.9)
    late = torch.tensor([value for _, value in falling()], dtype=torch.float64)[-25:]
    assert course.late_loss == pytest.approx(float(late.mean()))
    assert course.late_std == pytest.approx(float(late.std(correction=0)))
    assert course.gap == pytest.approx(0.05)
    # 2 exp(-0.01 s) = 0.2 at s = 230; means over five points, forty steps wide, shift and lower the beginning.
    assert course.steps_to_fraction == pytest.approx(230 + 40, abs=20)


@pytest.mark.parametrize(("fraction", "step"), [(0.25, 10), (0.5, 10), (0.75, 30), (1.0, 40)])
def test_steps_to_a_fraction(fraction: float, step: int) -> None:
    points = [(0, 0.2), (10, 0.6), (20, 0.65), (30, 0.9), (40, 1.0)]
    assert steps_to_fraction(points, fraction, higher_is_better=True) == step
    assert steps_to_fraction([(s, -v) for s, v in points], fraction) == step
    assert steps_to_fraction(points, fraction) is None
    assert steps_to_fraction(points[:1], fraction) is None


def test_history_stays_within_its_capacity() -> None:
    history = LossHistory(num_tasks=2, every=5, capacity=16)
    for step in range(5000):
        history.add(step, torch.tensor([float(step)]), [1])
        assert history.length <= 16
    assert len(history.steps) >= 8
    assert history.steps.tolist() == [history.every * i for i in range(history.length)]
    assert history.losses[:, 1].tolist() == history.steps.float().tolist()
    assert history.losses[:, 0].isnan().all()


def test_a_training_ends_with_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = TensorBoardLogger(str(tmp_path))
    monitor = Convergence(1, metric="accuracy")
    data = batches(4, 4, 4, 4)
    said: list[str] = []
    monkeypatch.setattr(convergence, "rank_zero_info", said.append)
    fit(binary(), loader(*data), loader(*data[:2]), max_epochs=3, callbacks=[monitor], logger=logger)
    assert [course.task for course in monitor.courses()] == list(TASKS)
    for course in monitor.courses():
        assert course.train_loss is not None
        assert course.val_loss is not None
    assert "| task | steps to 90 %" in said[0]
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert "convergence/text_summary" in events.Tags()["tensors"]
    assert {f"convergence/gap/{task}" for task in TASKS} <= set(events.Tags()["scalars"])


def test_epoch_means_are_those_that_are_logged() -> None:
    memory, monitor = Memory(), Convergence(1)
    fit(small(), loader(*batches(4, 4)), loader(*batches(4)), callbacks=[monitor], logger=memory, max_epochs=2)
    logged: dict[str, Any] = {}
    for _, line in memory.lines:
        logged.update(line)
    for course in monitor.courses():
        assert course.train_loss == pytest.approx(logged[f"loss_epoch/{course.task}"])
        assert course.val_loss == pytest.approx(logged[f"val/loss/{course.task}"])
        assert logged[f"convergence/gap/{course.task}"] == pytest.approx(course.gap)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"every_n_steps=0\) must be at least 1"):
        Convergence(0)
    with pytest.raises(ValueError, match=r"fraction=1.5\) must lie above 0"):
        Convergence(fraction=1.5)
    with pytest.raises(ValueError, match=r"metric='auc'\) is no task's metric; the tasks have \['accuracy', 'error'\]"):
        fit(binary(), loader(*batches(4)), callbacks=[Convergence(metric="auc")])
