"""Weights that are derivatives of a function of the losses, and those that follow their statistics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_mtl.weighting import GLS, IMTLL, RLW, STCH, CoVWeighting, ScaleInvariant
from lightning_mtl.weighting.imtll import imtll_gradient
from lightning_mtl.weighting.stch import stch_weights
from tests.contract import ask, course, names, run, signals
from tests.small import batch, small
from tests.training import Steps, fit, loader
from tests.weightings import fixed

pytestmark = pytest.mark.filterwarnings("ignore:.* times the median weight of the others:UserWarning")

LOSSES = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)


def derivative(value: Tensor, by: Tensor) -> Tensor:
    return torch.autograd.grad(value, by)[0]


def test_gls_descends_the_geometric_mean() -> None:
    losses = torch.rand(7, dtype=torch.float64).requires_grad_()
    weights = GLS().weigh(signals(losses.detach()))
    torch.testing.assert_close(weights, derivative(losses.prod() ** (1 / 7), losses))


def test_gls_leaves_a_loss_of_zero_out() -> None:
    weights = GLS().weigh(signals(torch.tensor([0.5, 0.0, 2.0])))
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.0, 0.25]))


def test_scale_invariance() -> None:
    scales = torch.tensor([1e-6, 1.0, 1e5], dtype=torch.float64)
    for weighting in (GLS(total=1.0), ScaleInvariant()):
        # In any units the weighted losses are in the same ratio.
        products = [weighting.weigh(signals(LOSSES * scale)) * LOSSES * scale for scale in (torch.ones(3), scales)]
        torch.testing.assert_close(products[0] / products[0].sum(), products[1] / products[1].sum())


@pytest.mark.parametrize("weighting", [GLS, ScaleInvariant, STCH])
def test_a_negative_loss_is_refused(weighting: type[GLS]) -> None:
    losses = torch.tensor([0.5, -0.25, 1.0])
    found = weighting()
    found.reset(["a", "b", "c"])
    assert found.weigh(signals(losses)).isfinite().all()
    with pytest.raises(ValueError, match=r"takes the logarithm of each loss, and the losses are .*'b': -0.25"):
        ask(found, signals(losses))


def test_imtlls_golden_gradient() -> None:
    log_scales = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64).requires_grad_()
    value = (log_scales.exp() * LOSSES - log_scales).sum()
    assert float(value.detach()) == pytest.approx(3.3399057727697903)
    torch.testing.assert_close(imtll_gradient(log_scales.detach(), LOSSES), derivative(value, log_scales))


def test_imtll_brings_all_scaled_losses_to_1() -> None:
    weighting = IMTLL(lr=0.05)
    weighting.reset(["a", "b", "c"])
    for step in range(1000):
        weights = ask(weighting, signals(LOSSES, step=step))
    torch.testing.assert_close(weights * LOSSES, torch.ones(3, dtype=torch.float64), rtol=1e-3, atol=0.0)


def test_stch_golden() -> None:
    golden = torch.tensor([0.0021546015026288634, 0.31977121561230815, 0.0114075162183963], dtype=torch.float64)
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(stch_weights(LOSSES, third, mu=0.1), golden)


def test_stch_descends_the_smooth_maximum_of_the_log_ratios() -> None:
    weighting = STCH(mu=0.4, warmup_epochs=2, preference={"b": 1.5})
    weighting.reset(list(names(3)))
    nadir = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64)
    for step, (epoch, factor) in enumerate([(0, 9.0), (0, 9.0), (1, 0.5), (1, 1.5)]):
        weights = ask(weighting, signals(factor * nadir, step=step, epoch=epoch))
        torch.testing.assert_close(weights, 1 / (factor * nadir))
    losses = LOSSES.clone().requires_grad_()
    preference = torch.tensor([1.0, 1.5, 1.0], dtype=torch.float64)
    value = 3 * 0.4 * torch.logsumexp(preference * torch.log(losses / nadir) / 0.4, dim=0)
    for step in (4, 5):  # The nadir stays.
        weights = ask(weighting, signals(LOSSES, step=step, epoch=2))
        torch.testing.assert_close(weights, derivative(value, losses).detach(), rtol=1e-6, atol=0.0)
        losses = LOSSES.clone().requires_grad_()
        value = 3 * 0.4 * torch.logsumexp(preference * torch.log(losses / nadir) / 0.4, dim=0)


def test_a_task_absent_from_stchs_warmup_has_its_first_loss_for_a_nadir() -> None:
    weighting = STCH(mu=1.0, warmup_epochs=1)
    weighting.reset(["a", "b"])
    ask(weighting, signals(torch.tensor([1.0]), tasks=["a"]))
    for step, loss in enumerate([5.0, 4.0], start=1):
        ask(weighting, signals(torch.tensor([1.0, loss]), step=step, epoch=1))
    assert weighting.nadir.tolist() == [1.0, 5.0]


def official_cov(course: list[Tensor]) -> list[Tensor]:
    """The authors' recurrence, written anew."""
    mean_loss = mean_ratio = squares = deviation = torch.zeros(3, dtype=torch.float64)
    found = []
    for step, losses in enumerate(course):
        ratios = losses / (losses if step == 0 else mean_loss)
        coefficients = deviation / mean_ratio if step > 1 else torch.ones(3, dtype=torch.float64)
        found.append(coefficients / coefficients.sum())
        keep = 0.0 if step == 0 else 1 - 1 / (step + 1)
        new_mean = keep * mean_ratio + (1 - keep) * ratios
        squares = squares + (ratios - mean_ratio) * (ratios - new_mean)
        mean_ratio, mean_loss = new_mean, keep * mean_loss + (1 - keep) * losses
        deviation = torch.sqrt(squares / (step + 1) + 1e-8)
    return found


def test_cov_follows_the_official_recurrence() -> None:
    torch.manual_seed(1)
    losses = [torch.rand(3, dtype=torch.float64) + torch.tensor([0.1, 1.0, 9.0]) for _ in range(20)]
    weights = run(CoVWeighting(), [signals(loss, step=step) for step, loss in enumerate(losses)], names(3))
    torch.testing.assert_close(weights, torch.stack(official_cov(losses)), rtol=1e-4, atol=1e-6)


def test_cov_gives_a_loss_that_no_longer_changes_little_weight() -> None:
    steps = [signals(torch.tensor([0.3, 1 / (1 + step)]), step=step) for step in range(50)]
    assert run(CoVWeighting(), steps, ["a", "b"])[-1, 0] < 1e-3


@pytest.mark.parametrize("distribution", ["normal", "dirichlet"])
def test_rlw(distribution: str) -> None:
    weighting = RLW(distribution)  # type: ignore[arg-type]
    weights = run(weighting, course(4, steps=2000), names(4))
    torch.testing.assert_close(weights.sum(1), torch.ones(2000))
    torch.testing.assert_close(weights.mean(0), torch.full((4,), 0.25), rtol=0.0, atol=0.02)
    assert len(weights.unique(dim=0)) == 2000
    # Dirichlet(1, 1, 1, 1) has variance 3 / 80; the softmax of a normal draw is less spread.
    variance = float(weights.var(0).mean())
    assert variance == pytest.approx(3 / 80, rel=0.1) if distribution == "dirichlet" else variance < 3 / 80


def test_a_draw_serves_the_whole_step_and_follows_the_seed() -> None:
    first, second, other = RLW(), RLW(), RLW(seed=1)
    for weighting in (first, second, other):
        weighting.reset(["a", "b", "c"])
    given = course(3)[0]
    assert torch.equal(first.weigh(given), first.weigh(given))
    assert torch.equal(first.weigh(given), second.weigh(given))
    assert not torch.equal(first.weigh(given), other.weigh(given))
    first.update(given)
    assert not torch.equal(first.weigh(given), second.weigh(given))


@pytest.mark.parametrize("total", [1.0, 6.0])
def test_total(total: float) -> None:
    steps, tasks = Steps(), ("a", "b")
    weighting = GLS(total=total, importance={"b": 3.0}, start_step=1)
    fit(small(tasks), loader(batch(), batch(seed=6)), callbacks=[weighting, steps])
    assert steps.weights[0] is not None
    assert steps.weights[0].tolist() == [1.0, 3.0]
    assert steps.weights[1] is not None
    assert float(steps.weights[1][0] + steps.weights[1][1] / 3) == pytest.approx(total)


def test_total_leaves_weights_without_a_positive_sum() -> None:
    for given in ([0.0, 0.0], [1.0, -1.0], [1.0, -2.0]):
        weighting = fixed({"a": given[0], "b": given[1]}, "losses", total=4.0)
        weighting.reset(["a", "b"])
        assert ask(weighting, signals(torch.ones(2))).tolist() == given


def test_total_also_holds_between_measurements() -> None:
    weighting = fixed({"a": 1.0, "b": 3.0}, "gramian", total=8.0, every_n_steps=2)
    weighting.reset(["a", "b"])
    rows = torch.eye(2)
    for step in range(4):
        assert ask(weighting, signals(torch.ones(2), rows, step=step)).tolist() == [2.0, 6.0]
    assert weighting.held_weights.tolist() == [1.0, 3.0]


def test_total_between_measurements_is_that_of_the_tasks_that_were_measured() -> None:
    weighting = fixed({"a": 1.0, "b": 3.0}, "gramian", total=8.0, every_n_steps=2)
    weighting.reset(["a", "b"])
    ask(weighting, signals(torch.ones(1), torch.eye(1)))
    assert ask(weighting, signals(torch.ones(2), step=1)).tolist() == [8.0, 1.0]  # nothing is known of b yet


@pytest.mark.parametrize("total", [0.0, -1.0, math.inf, math.nan])
def test_totals_out_of_range(total: float) -> None:
    with pytest.raises(ValueError, match=r"GLS\(total=.*\) must be above 0 and finite"):
        GLS(total=total)
