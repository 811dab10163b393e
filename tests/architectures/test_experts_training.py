"""Trained with every weighting, measured exactly, compiled, resumed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch._functorch import config as functorch

from lightning_mtl import Weighting
from lightning_mtl.monitors import GateUsage
from lightning_mtl.weighting import MGDA, UncertaintyWeighting
from tests.architectures.models import TASKS, TRUNKS, batch, build
from tests.contract import one_of_each, reach
from tests.contract_rows import MAKES
from tests.gradients.oracle import (
    assert_same,
    expected_update,
    feature_gradients,
    penalty_gradients,
    rows_at,
    task_gradients,
)
from tests.thinning import thinned
from tests.training import Steps, fit, flat_parameters, loader
from tests.weightings import fixed


@pytest.mark.parametrize("make", one_of_each(MAKES, reach))
@pytest.mark.parametrize("kind", thinned(["MTAN", "PLE"]))
def test_every_weighting_trains_them(kind: str, make: Callable[[], Weighting]) -> None:
    module = build(kind)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    batches = [batch(seed=seed) for seed in range(3)]
    trainer = fit(module, loader(*batches), loader(batch()), callbacks=[make()])
    assert trainer.global_step == 3
    for name, parameter in module.named_parameters():
        assert bool(parameter.isfinite().all()), name
        assert not parameter.equal(before[name]), f"{name} did not move"


@pytest.mark.parametrize("place", ["trunk", "features", "last_layer"])
@pytest.mark.parametrize("kind", TRUNKS)
def test_what_is_measured_and_applied_is_what_autograd_says(kind: str, place: str) -> None:
    module = build(kind, optimizer=functools.partial(torch.optim.SGD, lr=1.0)).double()
    given = batch(dtype=torch.float64)
    gradients = task_gradients(module, given)
    module.penalties()  # of those passes, whose graphs are gone
    penalty = penalty_gradients(module, given)
    if place == "features":
        rows = torch.stack(list(feature_gradients(module, given).values()))
        # Each task has an output of its own.
        assert (rows @ rows.T).count_nonzero() == len(TASKS)
    elif place == "trunk":
        rows = rows_at(module, gradients, module.shared_parameters())
    module.penalties()
    weights = dict(zip(TASKS, (0.5, 2.0, -0.7), strict=True))
    # At the features a weight acts on all that lies below, parts of single tasks included.
    weighs_heads = place != "trunk"
    expected = expected_update(module, gradients, weights, penalty, weighs_heads=weighs_heads)
    weighting, steps = fixed(weights, "gramian", weighs_heads=weighs_heads, at=place), Steps()
    fit(module, loader(given), callbacks=[weighting, steps])
    gramian = weighting.asked[0].gramian
    assert gramian is not None
    if place == "last_layer":
        assert bool((gramian.diagonal() > 0).all()), "the layer is one that all tasks share"
    else:
        torch.testing.assert_close(gramian, rows @ rows.T, rtol=1e-10, atol=1e-12)
    assert_same(steps.gradients[0], expected)


@pytest.mark.parametrize("kind", TRUNKS)
def test_shared_are_the_parameters_that_more_than_one_task_reaches(kind: str) -> None:
    module = build(kind)
    gradients = task_gradients(module, batch())
    reached = {
        name: sum(gradients[task][name] is not None and bool(gradients[task][name].any()) for task in TASKS)  # type: ignore[union-attr]
        for name, _ in module.trunk.named_parameters(prefix="trunk")
    }
    shared = set(module.shared_parameters())
    names = {name for name, parameter in module.named_parameters() if parameter in shared}
    assert names == {name for name, tasks in reached.items() if tasks > 1}
    assert min(reached.values()) > 0


@pytest.mark.parametrize("kind", ["DSelectK", pytest.param("static DSelectK", marks=pytest.mark.slow)])
def test_the_entropy_is_trained_down_to_a_choice(kind: str) -> None:
    def entropy_after(strength: float) -> float:
        module = build(kind, optimizer=functools.partial(torch.optim.Adam, lr=0.05))
        module.trunk.entropy = strength  # type: ignore[assignment]
        trainer = fit(module, loader(*[batch(seed=s) for s in range(10)]), max_epochs=5, callbacks=[MGDA()])
        assert trainer.callback_metrics["penalty/gate_entropy"] > -1e-5
        module.trunk.train()
        module.trunk.entropy = 1.0  # type: ignore[assignment]
        module(batch()[0])
        return float(module.penalties()["gate_entropy"].detach())

    assert entropy_after(0.3) < 0.2 * entropy_after(0.0)


def test_a_trunk_with_pending_penalties_can_be_copied_and_bounded() -> None:
    trunk = TRUNKS["DSelectK"]()
    for _ in range(9):
        trunk(batch()[0])
    copied = copy.deepcopy(trunk)
    assert copied.penalties() == {}  # type: ignore[operator]
    assert trunk.penalties()["gate_entropy"] > 0  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["MTAN", "PLE", "DSelectK"])
def test_compiled(kind: str) -> None:
    torch._dynamo.reset()
    given = batch(dtype=torch.float64)
    plain, compiled = build(kind).double(), build(kind).double()
    with functorch.patch(donated_buffer=False):
        whole: Any = torch.compile(compiled.trunk, backend="aot_eager", fullgraph=True)
        assert isinstance(whole, nn.Module)
        compiled.trunk = whole
        usages = []
        for module in (plain, compiled):
            usages.append(GateUsage())
            fit(module, loader(given, given), max_epochs=2, callbacks=[UncertaintyWeighting(), usages[-1]])
    assert list(usages[0].latest) == list(usages[1].latest)
    for name, table in usages[0].latest.items():
        torch.testing.assert_close(usages[1].latest[name].values, table.values, equal_nan=True)
    torch.testing.assert_close(flat_parameters(compiled), flat_parameters(plain), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["MTAN", "PLE", "DSelectK"])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(kind: str, tmp_path: Path) -> None:
    def trained(epochs: int, ckpt: Path | None = None) -> tuple[Any, pl.Trainer]:
        module = build(kind)
        weighting: Weighting = MGDA()
        batches = loader(*[batch(seed=s) for s in range(3)])
        return module, fit(module, batches, max_epochs=epochs, callbacks=[weighting], ckpt_path=ckpt)

    whole, _ = trained(3)
    _, trainer = trained(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert torch.load(tmp_path / "half.ckpt", weights_only=True)["global_step"] == 6
    resumed, _ = trained(3, tmp_path / "half.ckpt")
    assert flat_parameters(resumed).equal(flat_parameters(whole))
