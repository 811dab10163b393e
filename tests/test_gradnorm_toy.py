"""GradNorm's toy: two tasks whose targets differ in scale by 100, and the small one not drowned by the large one.

Inputs and outputs have 10 dimensions instead of the paper's 250 and 100, so that a few hundred steps suffice.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from benchmarks.gradnorm_problem import ScaledTasks, losses_on
from benchmarks.gradnorm_toy import Course, below, main, scales_of
from lightning_mtl import Weighting
from lightning_mtl.weighting import GradNorm
from tests.training import Steps, fit

SCALES = {"small": 1.0, "large": 100.0}


SEEDS = (0, 1)  # by how much GradNorm helps differs from one B and ε to the next


def normalized(weighting: Weighting | None, seed: int) -> tuple[dict[str, float], Steps]:
    """L_k(end) / L_k(0) on test data."""
    problem, steps = ScaledTasks(SCALES, inputs=10, outputs=10, batch_size=100, batches=400, seed=seed), Steps()
    module, test = problem.model(), problem.test_batch(400)
    before = losses_on(module, test)
    fit(module, DataLoader(problem, batch_size=None), callbacks=[steps, *([] if weighting is None else [weighting])])
    return {task: after / before[task] for task, after in losses_on(module, test).items()}, steps


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:In the first step the loss of task")  # the toy's point
def test_gradnorm_keeps_the_small_task_from_drowning() -> None:
    equal = [normalized(None, seed)[0] for seed in SEEDS]
    balanced = []
    for seed in SEEDS:
        ratios, steps = normalized(GradNorm(alpha=0.12), seed)
        balanced.append(ratios)
        weights = steps.weights[-1]
        assert weights is not None
        assert float(weights[0]) > 1.5 > 0.5 > float(weights[1])
        assert weights.sum() == pytest.approx(2.0, rel=1e-5)
    assert sum(ratios["small"] for ratios in balanced) < 0.8 * sum(ratios["small"] for ratios in equal)
    assert sum(sum(ratios.values()) for ratios in balanced) < 0.9 * sum(sum(ratios.values()) for ratios in equal)


def test_the_problem_is_the_papers() -> None:
    problem = ScaledTasks(scales_of(10), batches=1)
    one, other = (problem.own[task] for task in ("task0", "task1"))
    # B + ε_k: deviations of 10 and 3.5 that add up by their squares; the difference of two has ε's alone.
    assert one.shape == (100, 250)
    assert one.std().item() == pytest.approx((10**2 + 3.5**2) ** 0.5, rel=0.02)
    assert (one - other).std().item() == pytest.approx(3.5 * 2**0.5, rel=0.02)
    x, targets = problem.test_batch(50)
    torch.testing.assert_close(x.norm(dim=1), torch.ones(50))
    scales = list(scales_of(10).values())
    assert scales == sorted(scales)
    assert 1 < scales[0] < scales[-1] < 100
    for task, scale in scales_of(10).items():
        torch.testing.assert_close(targets[task], scale * torch.tanh(x @ problem.own[task].T))


def test_every_iteration_yields_the_same_fresh_batches() -> None:
    problem = ScaledTasks(SCALES, inputs=3, outputs=2, batch_size=4, batches=3)
    first, second = list(problem), list(problem)
    assert len(first) == 3
    for (x, _), (again, _) in zip(first, second, strict=True):
        torch.testing.assert_close(x, again, rtol=0, atol=0)
    for (x, _), (other, _) in itertools.combinations([*first, problem.test_batch(4)], 2):
        assert not torch.isclose(x, other).any(dim=1).all()


def test_ends_are_compared_beyond_what_losses_jump() -> None:
    assert below([0.9, 1.9], [1.0, 2.0])
    assert not below([0.9, 1.99], [1.0, 2.0])
    course = Course("GradNorm", 2, 0, list(range(10)), [[float(i), 1.0] for i in range(10)], [], 0.0)
    assert course.end == [6.5, 1.0]  # of the last six
    assert course.sums[0] == 1.0


def test_a_short_run_writes_results_and_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--steps", "3", "--seeds", "1", "--results", str(tmp_path)])
    report = json.loads((tmp_path / "gradnorm_toy.json").read_text())
    assert (tmp_path / "gradnorm_toy.png").stat().st_size > 10_000
    assert [(run["method"], run["num_tasks"]) for run in report["results"]] == [
        (method, num_tasks) for num_tasks in (2, 10) for method in ("equal weights", "UncertaintyWeighting", "GradNorm")
    ]
    for run in report["results"]:
        assert run["ratios"][0] == [1.0] * run["num_tasks"]
        assert run["steps"] == [0, 1, 2, 3]
        assert len(run["weights"]) == 4
    assert sum(report["results"][2]["weights"][-1]) == pytest.approx(2.0, rel=1e-5)
    assert "The paper's claims" in capsys.readouterr().out
