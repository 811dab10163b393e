"""Methods that solve for weights: what their directions promise, on families of Jacobians."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_mtl import Weighting
from lightning_mtl.solvers import min_norm_weights
from lightning_mtl.weighting import (
    IMTL,
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    FairGrad,
    NashMTL,
    UPGrad,
)
from lightning_mtl.weighting.aligned_mtl import aligned_mtl_weights
from lightning_mtl.weighting.cagrad import cagrad_weights
from lightning_mtl.weighting.config import config_weights
from lightning_mtl.weighting.imtlg import imtlg_weights
from lightning_mtl.weighting.upgrad import upgrad_weights
from tests.contract import J1, ask, names, signals
from tests.small import batch, batches, small
from tests.solvers.families import FAMILIES
from tests.training import Steps, fit, loader

# Some families are made to be far out.
pytestmark = [
    pytest.mark.filterwarnings("ignore:FairGrad.* makes the shared gradient:UserWarning"),
    pytest.mark.filterwarnings("ignore:NashMTL.* times the median weight of the others:UserWarning"),
]

NON_CONFLICTING: dict[str, Callable[[], Weighting]] = {
    "UPGrad": UPGrad,
    "DualProj": DualProj,
    "MGDA": MGDA,
    "CAGrad(1)": lambda: CAGrad(1.0),
    "CAGrad(3)": lambda: CAGrad(3.0),
    "NashMTL": NashMTL,
    "FairGrad(1)": FairGrad,
    "FairGrad(2)": lambda: FairGrad(2.0),
}
OTHERS: dict[str, Callable[[], Weighting]] = {
    "CAGrad(0.5)": CAGrad,
    "IMTLG": IMTLG,
    "IMTL": IMTL,
    "ConFIG": ConFIG,
    "AlignedMTL": AlignedMTL,
}


def jacobian(family: str, num_tasks: int) -> Tensor:
    rng = np.random.default_rng([num_tasks, *family.encode()])
    return torch.from_numpy(FAMILIES[family](rng, num_tasks))


def weigh(make: Callable[[], Weighting], rows: Tensor) -> Tensor:
    weighting = make()
    weighting.reset([str(k) for k in range(len(rows))])
    return weighting.weigh(signals(torch.ones(len(rows)), rows, tasks=weighting.tasks))


@pytest.mark.parametrize("method", NON_CONFLICTING)
@pytest.mark.parametrize("num_tasks", [2, 3, 8, 20])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_task_is_in_conflict(family: str, num_tasks: int, method: str) -> None:
    rows = jacobian(family, num_tasks)
    weights = weigh(NON_CONFLICTING[method], rows)
    assert weights.isfinite().all()
    products = rows @ (weights @ rows)
    assert products.min() >= -1e-6 * rows.square().sum()
    if family.startswith("norms_far_apart"):  # Beside the longest row, the others' conflicts would not be seen.
        norms = rows.norm(dim=1)
        assert (products >= -1e-6 * norms * (weights * norms).sum()).all()


@pytest.mark.parametrize("method", NON_CONFLICTING | OTHERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_finite_and_permuted_with_the_tasks(family: str, method: str) -> None:
    make = (NON_CONFLICTING | OTHERS)[method]
    rows = jacobian(family, 5)
    order = torch.tensor([3, 0, 4, 2, 1])
    weights, permuted = weigh(make, rows), weigh(make, rows[order])
    assert weights.isfinite().all()
    if family in ("independent", "norms_far_apart", "tiny", "huge", "nearly_parallel"):  # The weights are unique.
        torch.testing.assert_close(permuted, weights[order], rtol=1e-5, atol=1e-5 * float(weights.abs().max()))


@pytest.mark.parametrize("method", NON_CONFLICTING | OTHERS)
def test_one_task(method: str) -> None:
    weights = weigh((NON_CONFLICTING | OTHERS)[method], torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    # Alone a task goes its own way, at a length that is the method's.
    assert weights.shape == (1,)
    assert weights.item() > 0


@pytest.mark.parametrize("num_tasks", [2, 3, 8])
def test_imtlg_projects_equally_on_all_unit_gradients(num_tasks: int) -> None:
    rows = jacobian("independent", num_tasks) * torch.logspace(-2, 2, num_tasks, dtype=torch.float64)[:, None]
    weights = imtlg_weights(rows @ rows.T)
    assert float(weights.sum()) == pytest.approx(1.0)
    projections = (rows / rows.norm(dim=1, keepdim=True)) @ (weights @ rows)
    torch.testing.assert_close(projections, projections.mean().expand(num_tasks), rtol=1e-8, atol=0.0)


def test_imtlg_follows_the_papers_formula() -> None:
    rows = jacobian("independent", 4)
    units = rows / rows.norm(dim=1, keepdim=True)
    U, D = units[0] - units[1:], rows[0] - rows[1:]
    alpha = rows[0] @ U.T @ torch.linalg.inv(D @ U.T)
    torch.testing.assert_close(imtlg_weights(rows @ rows.T), torch.cat([1 - alpha.sum(0, keepdim=True), alpha]))


@pytest.mark.parametrize("noise", [0.0, 1e-9, 1e-7, 1e-5])
def test_parallel_gradients_do_not_blow_up(noise: float) -> None:
    torch.manual_seed(0)
    for _ in range(20):
        rows = torch.outer(torch.tensor([1.0, 2.0, 4.0]), torch.randn(30)) * (1 + noise * torch.randn(3, 30))
        for weights in (imtlg_weights(rows @ rows.T), config_weights(rows @ rows.T)):
            assert weights.abs().max() < 30
            assert weights.sum() > 0


def test_opposite_gradients_leave_imtlg_the_minimum_norm_point() -> None:
    rows = torch.tensor([[1.0, 1.0], [-3.0, -3.0]], dtype=torch.float64)
    torch.testing.assert_close(imtlg_weights(rows @ rows.T), torch.tensor([0.75, 0.25], dtype=torch.float64))
    assert config_weights(rows @ rows.T).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("num_tasks", [2, 3, 8])
def test_config_is_as_long_as_all_projections_together(num_tasks: int) -> None:
    rows = jacobian("independent", num_tasks)
    direction = config_weights(rows @ rows.T) @ rows
    cosines = torch.cosine_similarity(rows, direction.expand_as(rows), dim=1)
    torch.testing.assert_close(cosines, cosines.mean().expand(num_tasks), rtol=1e-8, atol=0.0)
    assert cosines.min() > 0
    torch.testing.assert_close(direction.norm(), (rows @ (direction / direction.norm())).sum())


@pytest.mark.parametrize("num_tasks", [2, 3, 8])
def test_aligned_gradients_are_orthogonal_and_equally_long(num_tasks: int) -> None:
    rows = jacobian("independent", num_tasks)
    eye = torch.eye(num_tasks, dtype=torch.float64)
    aligned = torch.stack([aligned_mtl_weights(rows @ rows.T, one) for one in eye]) @ rows
    least = torch.linalg.eigvalsh(rows @ rows.T)[0]
    torch.testing.assert_close(aligned @ aligned.T, least * eye, rtol=1e-8, atol=1e-8)


def test_aligned_mtls_levels() -> None:
    rows = torch.diag(torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64))
    p = torch.full((4,), 0.25, dtype=torch.float64)
    for scale, level in (("min", 1.0), ("median", 4.0), ("rmse", 85 / 4)):
        weights = aligned_mtl_weights(rows @ rows.T, p, scale)  # type: ignore[arg-type]
        torch.testing.assert_close(weights, level**0.5 * p / rows.diagonal())
    assert aligned_mtl_weights(torch.zeros(4, 4), p).tolist() == p.tolist()


def test_cagrad_stays_in_its_ball_and_rescales() -> None:
    rows = jacobian("independent", 6)
    mean = rows.mean(0)
    for c in (0.0, 0.3, 2.0):
        weights = cagrad_weights(rows @ rows.T, c)
        assert float((weights @ rows - mean).norm()) == pytest.approx(c * float(mean.norm()))
        torch.testing.assert_close(cagrad_weights(rows @ rows.T, c, "c") * (1 + c), weights)
        torch.testing.assert_close(cagrad_weights(rows @ rows.T, c, "c2") * (1 + c**2), weights)


def test_upgrad_is_linear_in_the_length_of_each_gradient() -> None:
    rows, p = jacobian("independent", 5), torch.full((5,), 0.2, dtype=torch.float64)

    def direction(scales: Tensor) -> Tensor:
        scaled = scales[:, None] * rows
        return upgrad_weights(scaled @ scaled.T, p) @ scaled

    torch.manual_seed(0)
    one, other = torch.rand(2, 5, dtype=torch.float64) + 0.1
    torch.testing.assert_close(direction(one + other), direction(one) + direction(other), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("cls", "index"), [(UPGrad, 0), (DualProj, 0), (AlignedMTL, 0)])
def test_a_preference_is_relative(cls: Any, index: int) -> None:
    # Orthogonal gradients of length 1: nothing but the preference is left.
    rows = torch.eye(3, dtype=torch.float64)
    weights = weigh(lambda: cls(preference={"0": 6.0, "2": 1.0}), rows)
    torch.testing.assert_close(weights, torch.tensor([0.75, 0.125, 0.125], dtype=torch.float64))
    assert weights[index] == weights.max()


@pytest.mark.parametrize("cls", [NashMTL, FairGrad])
def test_stationary_steps_are_counted(cls: Any) -> None:
    weighting = cls()
    weighting.reset(list(names(3)))
    stationary = jacobian("strongly_stationary", 3)
    for step, rows in enumerate([stationary, jacobian("independent", 3), stationary]):
        weights = ask(weighting, signals(torch.ones(3), rows, step=step))
        if step != 1:
            expected = torch.from_numpy(min_norm_weights((rows @ rows.T).numpy())).float()
            torch.testing.assert_close(weights, expected)
    assert int(weighting.stationary_steps) == 2
    assert int(weighting.state_dict()["state"]["stationary_steps"]) == 2


def test_nash_mtl_has_length_root_k_or_the_clip() -> None:
    for num_tasks in (1, 2, 5):
        rows = jacobian("independent", num_tasks)
        for max_norm, length in ((None, num_tasks**0.5), (1.0, 1.0), (100.0, num_tasks**0.5)):
            weights = weigh(lambda limit=max_norm: NashMTL(limit), rows)  # type: ignore[misc]
            assert float((weights @ rows).norm()) == pytest.approx(length)


def test_fairgrad_with_alpha_1_is_nash_mtl() -> None:
    rows = jacobian("independent", 6)
    torch.testing.assert_close(weigh(FairGrad, rows), weigh(NashMTL, rows))


def test_imtl_balances_the_scaled_gradients() -> None:
    weighting = IMTL(lr=0.1)
    weighting.reset(["a", "b"])
    rows = torch.tensor(J1, dtype=torch.float64)
    for step in range(10):
        ask(weighting, signals(torch.tensor([0.5, 4.0]), rows, step=step))
    scales = weighting.head_weights().double()
    weights = weighting.weigh(signals(torch.ones(2), rows))
    torch.testing.assert_close(weights / scales, imtlg_weights((scales[:, None] * rows) @ (scales[:, None] * rows).T))
    assert scales[0] > 1 > scales[1]


@pytest.mark.parametrize("place", ["trunk", "features"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_imtls_heads_follow_the_scaled_losses_alone(place: str, accumulate: int) -> None:
    given = [batch(seed=seed) for seed in range(accumulate)]
    weighting = IMTL(at=place)
    module = small(accumulate_grad_batches=accumulate)
    weighting_state = torch.tensor([0.5, -1.0])

    class Set(Steps):
        def on_train_start(self, *_: Any) -> None:
            weighting.log_scales = weighting_state.clone()

    steps, plain = Set(), Steps()
    fit(module, loader(*given), callbacks=[weighting, steps])
    fit(small(accumulate_grad_batches=accumulate), loader(*given), callbacks=[plain])
    for task, scale in zip(("a", "b"), weighting_state.exp().tolist(), strict=True):
        found, unweighted = (run.gradients[0][f"heads.{task}.weight"] for run in (steps, plain))
        assert found is not None
        assert unweighted is not None
        torch.testing.assert_close(found, scale * unweighted, rtol=1e-4, atol=1e-6)


def test_imtls_heads_have_weight_1_before_its_start() -> None:
    steps, plain = Steps(), Steps()
    weighting = IMTL(start_step=2)
    fit(small(), loader(*batches(4, 4)), callbacks=[weighting, steps])
    fit(small(), loader(*batches(4, 4)), callbacks=[plain])
    for one, other in zip(steps.gradients, plain.gradients, strict=True):
        for name, gradient in one.items():
            assert gradient is not None
            torch.testing.assert_close(gradient, other[name])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CAGrad(-1.0), r"CAGrad\(c=-1.0\) must be at least 0 and finite"),
        (lambda: CAGrad(torch.inf), r"CAGrad\(c=inf\) must be at least 0 and finite"),
        (lambda: CAGrad(torch.nan), r"CAGrad\(c=nan\) must be at least 0 and finite"),
        (lambda: CAGrad(rescale="c3"), r"CAGrad\(rescale='c3'\) must be None, 'c' or 'c2'"),  # type: ignore[arg-type]
        (lambda: NashMTL(0.0), r"NashMTL\(max_norm=0.0\) must be above 0; None leaves the length"),
        (lambda: FairGrad(0.0), r"FairGrad\(alpha=0.0\) must be above 0 and finite"),
        (lambda: AlignedMTL("max"), r"AlignedMTL\(scale='max'\) must be 'min', 'median' or 'rmse'"),  # type: ignore[arg-type]
        (lambda: UPGrad(preference={"a": 0.0}), r"UPGrad\(preference=...\) gives task 'a' 0.0; use a finite number"),
        (lambda: DualProj(preference={"a": -1.0}), r"DualProj\(preference=...\) gives task 'a' -1.0"),
        (lambda: IMTL(lr=0.0), r"IMTL\(lr=0.0\) must be above 0"),
    ],
)
def test_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("cls", [UPGrad, DualProj, AlignedMTL])
def test_preferences_of_unknown_tasks(cls: Any) -> None:
    with pytest.raises(ValueError, match=rf"{cls.__name__}\(preference=...\) names \['z'\]"):
        fit(small(), loader(batch()), callbacks=[cls(preference={"z": 1.0})])
