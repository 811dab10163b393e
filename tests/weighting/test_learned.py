"""GradNorm and UncertaintyWeighting against autograd and torch's Adam on the objectives as the papers write them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import mse_loss

from lightning_mtl.solvers.adam import AdamState, adam_step
from lightning_mtl.weighting import GradNorm, UncertaintyWeighting
from lightning_mtl.weighting.gradnorm import gradnorm_gradient
from tests.contract import ask, course, names, run, signals
from tests.gradients.oracle import rows_at, task_gradients
from tests.small import batches, small
from tests.training import Steps, fit, loader


@pytest.mark.parametrize("alpha", [0.0, 0.12, 1.5])
@pytest.mark.parametrize("num_tasks", [1, 2, 4])
def test_gradnorm_follows_autograd_through_its_loss(alpha: float, num_tasks: int) -> None:
    steps = course(num_tasks, steps=12)
    found = run(GradNorm(alpha, lr=0.05), steps, names(num_tasks))
    weights = torch.ones(num_tasks, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.05)
    first = steps[0].losses
    for position, given in enumerate(steps):
        torch.testing.assert_close(found[position], weights.detach(), rtol=1e-5, atol=1e-6)
        assert given.norms is not None
        scaled = weights * given.norms.float()
        ratios = given.losses / first
        target = (scaled.mean() * (ratios / ratios.mean()) ** alpha).detach()
        optimizer.zero_grad()
        (scaled - target).abs().sum().backward()
        optimizer.step()
        with torch.no_grad():
            weights.clamp_(min=1e-3)
            weights.mul_(num_tasks / weights.sum())


def test_gradnorm_clamps_before_it_renormalizes() -> None:
    weighting = GradNorm(alpha=0.0, lr=5.0)
    weighting.reset(["a", "b", "c"])
    # a's norm is above the mean, the others' below: 1 - 5, 1 + 5 and 1 + 5, before the clamp.
    rows = torch.diag(torch.tensor([10.0, 1.0, 1.0], dtype=torch.float64))
    ask(weighting, signals(torch.ones(3), rows))
    expected = torch.tensor([1e-3, 6.0, 6.0]) * 3 / 12.001
    torch.testing.assert_close(weighting.weights, expected, rtol=1e-5, atol=0.0)


def test_gradnorm_counts_tasks_alike_whose_losses_are_nothing() -> None:
    norms = torch.tensor([1.0, 3.0])
    assert gradnorm_gradient(torch.ones(2), norms, torch.zeros(2), alpha=1.5).tolist() == [-1.0, 3.0]
    found = []
    for losses in ((0.0, 5.0), (2.0, 2.0)):  # there is no share of a first loss of 0: it counts as one that stays
        weighting = GradNorm(lr=0.1)
        weighting.reset(["a", "b"])
        for step, loss in enumerate(losses):
            ask(weighting, signals(torch.tensor([loss, 1.0]), torch.diag(norms), step=step))
        found.append(weighting.weights)
    assert torch.equal(*found)


def test_gradnorm_in_a_fit_measures_the_last_layer() -> None:
    module, steps, given = small(optimizer=lambda p: torch.optim.SGD(p, lr=0.0)), Steps(), batches(4, 3)
    layer = [p for name, p in module.named_parameters() if name.startswith("trunk.2.")]
    expected = [rows_at(module, task_gradients(module, one), layer).norm(dim=1) for one in given]
    fit(module, loader(*given), callbacks=[GradNorm(), steps])
    for found, norms in zip(steps.signals, expected, strict=True):
        assert found.norms is not None
        torch.testing.assert_close(found.norms, norms)


@pytest.mark.parametrize("regularizer", ["log", "log1p"])
def test_uncertainty_follows_torchs_adam_on_the_objective(regularizer: str) -> None:
    kinds = {"a": "regression", "b": "classification", "c": "regression"}
    factors = torch.tensor([0.5, 1.0, 0.5])
    steps = course(3, steps=15, loss_scale=torch.tensor([1.0, 30.0, 0.02]))
    weighting = UncertaintyWeighting(kinds, lr=0.1, regularizer=regularizer)  # type: ignore[arg-type]
    found = run(weighting, steps, names(3))
    s = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([s], lr=0.1)
    for position, given in enumerate(steps):
        torch.testing.assert_close(found[position], factors * torch.exp(-s.detach()), rtol=1e-4, atol=1e-6)
        extra = s / 2 if regularizer == "log" else torch.log(1 + torch.exp(s))
        optimizer.zero_grad()
        (factors * torch.exp(-s) * given.losses + extra).sum().backward()
        optimizer.step()
    torch.testing.assert_close(weighting.log_variances, s.detach(), rtol=1e-4, atol=1e-5)


def test_uncertainty_settles_where_the_objective_is_flat() -> None:
    # d/ds = 0 at w = c exp(-s) = 1 / (2 L).
    weighting = UncertaintyWeighting(lr=0.05)
    weighting.reset(["a", "b", "c"])
    given = course(3, steps=1)[0]
    for _ in range(800):
        ask(weighting, given)
    torch.testing.assert_close(ask(weighting, given), 0.5 / given.losses, rtol=1e-3, atol=0.0)


def test_adam_is_torchs() -> None:
    start, gradients = torch.randn(5), torch.randn(20, 5)
    parameter = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([parameter], lr=0.03, betas=(0.8, 0.95), eps=1e-6)
    values, state = start, AdamState(torch.zeros(5), torch.zeros(5), torch.zeros(5))
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        values, state = adam_step(values, gradient, state, lr=0.03, betas=(0.8, 0.95), eps=1e-6)
        torch.testing.assert_close(values, parameter.detach(), rtol=1e-5, atol=1e-6)


def test_uncertainty_in_a_fit_uses_the_mean_loss() -> None:
    module, steps, given = small(), Steps(), batches(4)
    losses = [mse_loss(module(given[0][0])[task], given[0][1][task]).item() for task in ("a", "b")]
    fit(module, loader(*given), callbacks=[UncertaintyWeighting(), steps])
    assert steps.signals[0].losses.tolist() == pytest.approx(losses)
