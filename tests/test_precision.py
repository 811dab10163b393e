"""Half, mixed and double precision: what weightings see, what the optimizer gets, and what a gradient scaler does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.functional import mse_loss

from lightning_mtl import Weighting
from lightning_mtl.weighting import MGDA, StaticWeights
from tests.plain import WEIGHTS, Plain, momentum
from tests.small import TASKS, Batch, batch, batches, small, trunk
from tests.training import History, Steps, fit, flat_parameters, loader
from tests.weightings import fixed

WAYS: dict[str, Callable[[], Weighting]] = {
    "losses": lambda: StaticWeights(WEIGHTS),
    "features": lambda: fixed(WEIGHTS, "gramian", at="features"),
    "layer": lambda: fixed(WEIGHTS, "norms", at="last_layer"),
    "trunk": lambda: fixed(WEIGHTS, "gramian", at="trunk"),
}
PLACES = ("trunk", "features", "last_layer")


SCALE = 2.0**10  # small enough for the first gradients to fit float16


def half_on_cpu(init_scale: float = SCALE, **arguments: Any) -> MixedPrecision:
    # Lightning's own precision="16-mixed" turns into bfloat16 on a CPU, without a word.
    return MixedPrecision("16-mixed", "cpu", scaler=GradScaler("cpu", init_scale=init_scale, **arguments))


PRECISIONS: dict[str, Callable[[], Precision]] = {
    "16-mixed": half_on_cpu,
    "bf16-mixed": lambda: MixedPrecision("bf16-mixed", "cpu"),
    "bf16-true": lambda: HalfPrecision("bf16-true"),
    "32": Precision,
    "64": DoublePrecision,
}


class Scales(pl.Callback):
    """The scaler's factor after each batch."""

    def __init__(self) -> None:
        self.factors: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        plugin = trainer.precision_plugin
        assert isinstance(plugin, MixedPrecision)
        assert plugin.scaler is not None
        self.factors.append(plugin.scaler.get_scale())


def with_overflows() -> list[Batch]:
    """Batches, two of which make gradients that float16 cannot hold."""
    found = batches(*[4] * 12)
    for index in (4, 9):
        inputs, targets = found[index]
        found[index] = inputs, {task: target * 60_000 for task, target in targets.items()}
    return found


@pytest.mark.parametrize("way", WAYS)
def test_a_scaler_grows_backs_off_and_skips_as_in_automatic_optimization(way: str) -> None:
    scaler = functools.partial(half_on_cpu, growth_interval=3)
    expected, expected_scales, found, scales = History(), Scales(), History(), Scales()
    fit(Plain(), loader(*with_overflows()), callbacks=[expected, expected_scales], plugins=[scaler()])
    with pytest.warns(UserWarning, match="Step 4 is skipped: a gradient is not finite"):
        fit(
            small(optimizer=momentum),
            loader(*with_overflows()),
            callbacks=[found, scales, WAYS[way]()],
            plugins=[scaler()],
        )
    assert scales.factors == expected_scales.factors
    assert scales.factors[4] < scales.factors[3] > scales.factors[0]
    for step in (4, 9):
        assert torch.equal(found.parameters[step], found.parameters[step - 1])
    # Sums in another order, of numbers with eleven bits.
    torch.testing.assert_close(torch.stack(found.parameters), torch.stack(expected.parameters), rtol=0, atol=2e-3)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_clipped_without_the_scalers_factor(way: str, algorithm: Any, accumulate: int) -> None:
    module = small(accumulate_grad_batches=accumulate, gradient_clip_val=0.01, gradient_clip_algorithm=algorithm)
    before = flat_parameters(module)
    fit(module, loader(*batches(*[4] * accumulate)), callbacks=[WAYS[way]()], plugins=[half_on_cpu()])
    change = before - flat_parameters(module)  # the step size is 1
    size = change.norm() if algorithm == "norm" else change.abs().max()
    assert float(size) == pytest.approx(0.01, rel=1e-3)


def rows_of(module: Any, data: Batch, place: str, plugin: Precision, scale: float) -> list[Tensor]:
    """Each task's gradient as this precision rounds it, one float64 vector each."""
    inputs, targets = plugin.convert_input(data)
    with plugin.train_step_context() if isinstance(plugin, MixedPrecision) else plugin.forward_context():
        z = module.trunk(inputs)
        losses = [mse_loss(module.heads[task](z), targets[task]) for task in TASKS]
    of = {"trunk": list(module.trunk.parameters()), "features": [z], "last_layer": list(module.trunk[2].parameters())}
    gradients = [torch.autograd.grad(loss * scale, of[place], retain_graph=True) for loss in losses]
    return [torch.cat([g.double().flatten() for g in own]) / scale for own in gradients]


def min_norm(first: Tensor, second: Tensor) -> float:
    """The first weight of the shortest convex combination of two vectors."""
    difference = first - second
    return float((-(second @ difference) / (difference @ difference)).clamp(0, 1))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_those_of_float64_on_the_rounded_gradients(precision: str, place: str) -> None:
    data, steps, plugin = batch(16), Steps(), PRECISIONS[precision]()
    reference = plugin.convert_module(small())
    scale = SCALE if precision == "16-mixed" else 1.0
    first, second = rows_of(reference, data, place, plugin, scale)
    fit(small(), loader(data), callbacks=[MGDA(at=place), steps], plugins=[PRECISIONS[precision]()])
    weights, gramian = steps.weights[0], steps.signals[0].gramian
    assert weights is not None
    assert gramian is not None
    assert gramian.dtype == torch.float64
    expected = torch.stack([first, second]) @ torch.stack([first, second]).T
    torch.testing.assert_close(gramian, expected, rtol=1e-6, atol=1e-9)
    share = min_norm(first, second)
    assert 0 < share < 1
    assert weights.tolist() == pytest.approx([share, 1 - share], abs=1e-5)
    assert steps.signals[0].losses.dtype == (torch.float64 if precision == "64" else torch.float32)


@pytest.mark.parametrize("place", PLACES)
def test_norms_are_measured_without_the_scalers_factor(place: str) -> None:
    data, weighting = batch(16), fixed(WEIGHTS, "norms", at=place)
    rows = rows_of(small(), data, place, half_on_cpu(), SCALE)
    fit(small(), loader(data), callbacks=[weighting], plugins=[half_on_cpu()])
    norms = weighting.asked[0].norms
    assert norms is not None
    torch.testing.assert_close(norms.double(), torch.stack([row.norm() for row in rows]), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_have_the_parameters_precision(precision: str, way: str) -> None:
    steps = Steps()
    module = small(optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    fit(module, loader(*batches(4, 4, 4)), callbacks=[WAYS[way](), steps], plugins=[PRECISIONS[precision]()])
    dtypes = {p.dtype for p in module.parameters()}
    assert dtypes == {{"bf16-true": torch.bfloat16, "64": torch.float64}.get(precision, torch.float32)}
    assert {g.dtype for gradients in steps.gradients for g in gradients.values() if g is not None} == dtypes
    assert torch.isfinite(flat_parameters(module)).all()


@pytest.mark.parametrize("place", PLACES)
def test_small_gradients_survive_half_precision(place: str) -> None:
    """Gradients below float16's range: without the scaler's factor they would be zero."""
    module, steps = small(), Steps()
    for head in module.heads.values():
        assert isinstance(head, nn.Linear)
        nn.init.zeros_(head.bias)
        head.weight.data.mul_(1e-3)
    inputs, _ = batch(16)
    tiny = inputs, {task: 2e-5 * torch.randn(16, 1) for task in TASKS}
    fit(module, loader(tiny), callbacks=[MGDA(at=place), steps], plugins=[half_on_cpu(2.0**16)])
    norms = steps.signals[0].norms
    assert norms is not None
    assert (norms > 0).all()
    assert (norms < 1e-5).all()


def test_normalization_layers_under_autocast() -> None:
    """Where gradients of half and of full precision meet."""
    layers = [nn.BatchNorm1d(3), *trunk(), nn.LayerNorm(4)]
    module = small()
    module.trunk = nn.Sequential(*layers)
    steps = Steps()
    fit(module, loader(*batches(4, 4)), callbacks=[MGDA(), steps], plugins=[half_on_cpu()])
    assert len(steps.weights) == 2
    assert torch.isfinite(flat_parameters(module)).all()
