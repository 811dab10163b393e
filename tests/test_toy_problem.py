"""The toy problem of CAGrad, Nash-MTL and FAMO: its losses, its front, and a short run of the benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.toy_pareto import main
from benchmarks.toy_problem import LOWER_BOUNDS, STARTS, distance_to_front, evaluate, front_x2, toy_losses


def test_losses_and_gradients_are_those_of_autograd() -> None:
    generator = torch.Generator().manual_seed(0)
    points = 20 * torch.rand(200, 2, generator=generator, dtype=torch.float64) - 10
    for point in [*points, *torch.tensor(STARTS, dtype=torch.float64)]:
        theta = point.clone().requires_grad_()
        losses = toy_losses(theta)
        found, gradients = evaluate(*point.tolist())
        for position, loss in enumerate(losses):
            (gradient,) = torch.autograd.grad(loss, theta, retain_graph=True)
            torch.testing.assert_close(loss.detach(), point.new_tensor(found[position]))
            torch.testing.assert_close(gradient, point.new_tensor(gradients[position]))
            assert found[position] > LOWER_BOUNDS[position]


@pytest.mark.parametrize("x1", [-6.9, -3.0, 0.0, 4.9])
def test_on_the_front_the_gradients_are_opposite(x1: float) -> None:
    x2 = front_x2(x1)
    _, (one, two) = evaluate(x1, x2)
    assert one[0] * two[1] == pytest.approx(one[1] * two[0], abs=1e-9)
    assert one[0] * two[0] + one[1] * two[1] < 0
    assert distance_to_front(x1, x2) == pytest.approx(0)


def test_the_front_lies_where_the_papers_have_it() -> None:
    assert front_x2(0.0) == pytest.approx(-8.355, abs=1e-3)
    assert all(-8.45 < front_x2(x1) < -8.35 for x1 in (-7.0, -3.5, 3.5, 7.0))
    assert distance_to_front(8.0, front_x2(7.0)) == pytest.approx(1)


def test_a_short_run_writes_its_outcomes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "toy.json"
    main(["--steps", "200", "--only", "MGDA", "--trainer-steps", "20", "--json", str(path)])
    report = json.loads(path.read_text())
    rows = [row for row in report["results"] if row["method"] == "MGDA"]
    assert [row["start"] for row in rows] == [[9.0, 9.0], [0.0, 0.0]]
    assert all(not row["reached"] and row["steps"] == 200 for row in rows)
    assert report["trainer"]["steps"] == 20
    assert report["trainer"]["largest_difference"] < 1e-9
    assert "MGDA" in capsys.readouterr().out
