"""MGDA's optimality and GradientNormBalance's ratios."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mtl.weighting import MGDA, GradientNormBalance
from tests.contract import ask, signals
from tests.small import batch, small
from tests.training import Steps, fit, loader


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(num_tasks=st.integers(1, 8), seed=st.integers(0, 10_000), spread=st.floats(0.0, 3.0))
@pytest.mark.parametrize("normalize", [None, "l2", "loss", "loss+"])
def test_mgda_is_optimal_for_the_scaled_gradients(normalize: Any, num_tasks: int, seed: int, spread: float) -> None:
    torch.manual_seed(seed)
    scales = 10.0 ** (spread * torch.randn(num_tasks, dtype=torch.float64))
    rows = torch.randn(num_tasks, 20, dtype=torch.float64) * scales[:, None]
    losses = torch.rand(num_tasks, dtype=torch.float64) + 0.1
    weighting = MGDA(normalize)
    weighting.reset([str(k) for k in range(num_tasks)])
    given_signals = signals(losses, rows, tasks=weighting.tasks)
    weights = weighting.weigh(given_signals)
    divisors = {
        None: torch.ones(num_tasks, dtype=torch.float64),
        "l2": rows.norm(dim=1),
        "loss": losses,
        "loss+": losses * rows.norm(dim=1),
    }[normalize]
    scaled = rows / divisors[:, None]
    assert weights.min() >= 0
    assert float(weights.sum()) == pytest.approx(1.0)
    # G w >= wᵀ G w, with equality on the support, each relative to the gradient's own length.
    direction = weights @ scaled
    slack = scaled @ direction - direction @ direction
    allowed = 1e-9 * scaled.norm(dim=1) * (weights @ scaled.norm(dim=1))
    assert (slack >= -allowed).all()
    assert (weights * slack <= weights.max() * allowed).all()


@pytest.mark.parametrize("place", ["trunk", "features"])
def test_mgdas_step_raises_no_loss_to_first_order(place: str) -> None:
    steps = Steps()
    fit(small(("a", "b", "c")), loader(batch(4, 5, ("a", "b", "c"))), callbacks=[MGDA(at=place), steps])
    gramian, weights = steps.signals[0].gramian, steps.weights[0]
    assert gramian is not None
    assert weights is not None
    assert (gramian @ weights.double()).min() >= -1e-9


def test_mgda_of_a_bounded_normalizer_with_a_loss_that_is_not_positive() -> None:
    weighting = MGDA("loss")
    weighting.reset(["a", "b"])
    weights = weighting.weigh(signals(torch.tensor([-1.0, 0.0]), torch.eye(2, dtype=torch.float64)))
    assert weights.tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("importance", [None, {"a": 4.0}])
def test_balanced_gradients_have_norms_in_the_ratio_of_the_importances(importance: dict[str, float] | None) -> None:
    weighting = GradientNormBalance(eps=1e-9, importance=importance)
    weighting.reset(["a", "b", "c"])
    rows = torch.randn(3, 9, dtype=torch.float64) * torch.tensor([[1e-3], [1.0], [50.0]])
    weights = ask(weighting, signals(torch.ones(3), rows))
    norms = weights * rows.norm(dim=1)
    wanted = torch.tensor([1.0 if importance is None else 4.0, 1.0, 1.0])
    torch.testing.assert_close((norms / norms[1]).float(), wanted, rtol=1e-4, atol=0.0)
    assert float(weights.sum()) == pytest.approx(3.0, rel=1e-5)


def test_a_vanishing_gradient_gets_a_bounded_weight() -> None:
    weighting = GradientNormBalance(eps=1e-3)
    weighting.reset(["a", "b", "c"])
    rows = torch.tensor([[1e-4, 0.0], [3.0, 0.0], [0.0, 3.0]], dtype=torch.float64)  # below 3e-5 it counts as zero
    weights = ask(weighting, signals(torch.ones(3), rows))
    assert float(weights.sum()) == pytest.approx(3.0)
    assert float(weights[0] / weights[1]) == pytest.approx((3.0 + 2e-3) / (1e-4 + 2e-3), rel=1e-3)
