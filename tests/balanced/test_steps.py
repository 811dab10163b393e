"""One step of a module of any shape is what differentiating each loss by itself says, with every kind of method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from lightning_mtl import Aggregator, BalancedModule, Signals, Weighting
from lightning_mtl.method.base import Measure
from lightning_mtl.weighting import MGDA
from tests.balanced import oracle
from tests.balanced.models import MODELS, Physics, made, points
from tests.training import Steps, fit, loader


class Norms(Weighting):
    """Inverse norms, for heads too."""

    measures: ClassVar[Measure] = "norms"

    def weigh(self, signals: Signals) -> Tensor:
        return 1 / self.needed(signals, "norms")


class Shared(Weighting):
    """Numbers that are known beforehand, for shared parameters alone."""

    weighs_heads = False
    reads_losses = False

    def weigh(self, signals: Signals) -> Tensor:
        return torch.arange(1, signals.num_tasks + 1).to(signals.losses)


class Median(Aggregator):
    def combine(self, signals: Signals, rows: Tensor) -> Tensor:
        return rows.quantile(0.3, dim=0)


class Watch(Steps):
    measures = "gramian"


METHODS: dict[str, Callable[[], Weighting | None]] = {
    "none": lambda: None,
    "losses for shared parameters": Shared,
    "norms": Norms,
    "gramian": MGDA,
    "gramian by rows": lambda: MGDA(gradients="rows"),
}


def weights_of(module: BalancedModule, steps: Steps, step: int = -1) -> dict[str, float]:
    weights, signals = steps.weights[step], steps.signals[step]
    assert weights is not None
    return {task: w for task, w in zip(module.tasks, weights.tolist(), strict=True) if task in signals.tasks}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_a_step(name: str, method: str) -> None:
    module, batch, weighting, steps = made(name), points(name), METHODS[method](), Watch()
    found = oracle.gradients(module, batch)
    names = oracle.shared(found)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    fit(module, loader(batch), callbacks=[steps] if weighting is None else [weighting, steps], precision=64)
    assert {n for n, p in module.named_parameters() if any(p is q for q in module.shared_parameters())} == names
    weights = weights_of(module, steps)
    heads = weights if weighting is None or weighting.weighs_heads else dict.fromkeys(weights, 1.0)
    expected = oracle.update(found, names, weights, heads)
    for n, parameter in module.named_parameters():
        change = before[n] - parameter.detach()
        torch.testing.assert_close(change, expected.get(n, torch.zeros_like(change)), rtol=1e-10, atol=1e-12)
    assert steps.signals[0].gramian is not None
    torch.testing.assert_close(steps.signals[0].gramian, oracle.gramian(found, names), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["Physics", "Functional", "Levels"])
def test_a_direction(name: str) -> None:
    module, batch = made(name), points(name)
    found = oracle.gradients(module, batch)
    names = oracle.shared(found)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    fit(module, loader(batch), callbacks=[Median()], precision=64)
    expected = oracle.update(found, names, dict.fromkeys(found, 0.0), dict.fromkeys(found, 1.0))
    for n, parameter in module.named_parameters():
        if n in names:
            rows = torch.stack([own.get(n, torch.zeros_like(parameter)) for own in found.values()])
            expected[n] = rows.quantile(0.3, dim=0)
        change = before[n] - parameter.detach()
        torch.testing.assert_close(change, expected.get(n, torch.zeros_like(change)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("number", [3, 200])
def test_layers_of_a_derivative_are_measured_without_rows_or_by_rows_exactly(number: int) -> None:
    # 3 points are fewer than a layer's 32 inputs, so that layers may be compressed; 200 are more.
    torch.manual_seed(1)
    module, batch, steps = MODELS["Physics"](width=32).double(), points("Physics", number), Steps()
    found = oracle.gradients(module, batch)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    fit(module, loader(batch), callbacks=[MGDA(), steps], precision=64)
    expected = oracle.update(found, set(before), weights_of(module, steps), {})
    for n, parameter in module.named_parameters():
        torch.testing.assert_close(before[n] - parameter.detach(), expected[n], rtol=1e-9, atol=1e-12)
    assert steps.signals[0].gramian is not None
    torch.testing.assert_close(steps.signals[0].gramian, oracle.gramian(found, set(before)), rtol=1e-9, atol=1e-12)


def test_named_modules_are_measured_alone() -> None:
    module, batch, steps = made("Decoder"), points("Decoder"), Watch()
    found = oracle.gradients(module, batch)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    fit(module, loader(batch), callbacks=[MGDA(at=["heads.2"]), steps], precision=64)
    measured = {n for n in before if n.startswith("heads.2.")}
    seen: Any = steps.signals[0].gramian
    torch.testing.assert_close(seen, oracle.gramian(found, oracle.shared(found)))
    w = weights_of(module, steps)
    minimal = MGDA().weigh(Signals(("a", "b"), torch.ones(2), 0, 0, gramian=oracle.gramian(found, measured)))
    torch.testing.assert_close(torch.tensor(list(w.values()), dtype=torch.float64), minimal.double())
    expected = oracle.update(found, oracle.shared(found), w, dict.fromkeys(w, 1.0))
    for n, parameter in module.named_parameters():
        torch.testing.assert_close(before[n] - parameter.detach(), expected[n])


@pytest.mark.parametrize("number", [3, 200])
@pytest.mark.parametrize("method", ["none", "gramian", "gramian by rows", "norms"])
def test_losses_with_graphs_of_their_own_are_passed_backward_once(method: str, number: int) -> None:
    # Each hidden tensor's gradient is computed as often as plain training of the sum does: there is no pass to apply.
    class Counted(Physics):
        calls = 0

        def count(self, _: Tensor) -> None:
            self.calls += 1

        def forward(self, points: Tensor) -> Tensor:
            hidden = self.net[:2](points)
            hidden.register_hook(self.count)
            result: Tensor = self.net[2:](hidden)
            return result

    torch.manual_seed(1)
    module, batch, weighting = Counted(width=32).double(), points("Physics", number), METHODS[method]()
    torch.stack([output.loss for output in module.present_outputs(batch).values()]).sum().backward()
    plain, module.calls = module.calls, 0
    fit(module, loader(batch), callbacks=[] if weighting is None else [weighting], precision=64)
    assert plain >= 3
    assert module.calls == plain
