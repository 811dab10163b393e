"""Freezing schedules: what trains when, how fast, and that what is measured follows what trains."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn.functional import mse_loss

from lightning_mtl import MultiTaskModule
from lightning_mtl.finetuning import GradualUnfreezing
from lightning_mtl.learning_rates import Importance, TaskLearningRate
from lightning_mtl.weighting import DWA, MGDA, GradDrop, GradNorm
from tests.small import TASKS, batch, heads, regressions, small
from tests.training import History, Memory, Steps, fit, loader
from tests.weightings import fixed

SGD = functools.partial(torch.optim.SGD, lr=0.1)
FROM_THE_TOP = functools.partial(GradualUnfreezing, every_n_epochs=1)


class Trained(Callback):
    """Which parameters get a gradient in each epoch, and what they were before its step."""

    def __init__(self) -> None:
        self.graded: list[set[str]] = []
        self.before: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.before.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.graded.append({name.rsplit(".", 1)[0] for name, p in pl_module.named_parameters() if p.grad is not None})


def plain_gradients(parameters: dict[str, torch.Tensor], wanted: set[str]) -> dict[str, torch.Tensor]:
    """Each task's gradient of the wanted shared parameters, side by side, by plain autograd."""
    model = small()
    model.load_state_dict(parameters)
    inputs, targets = batch(8)
    z = model.trunk(inputs)
    shared = [p for name, p in model.named_parameters() if name.rsplit(".", 1)[0] in wanted & {"trunk.0", "trunk.2"}]
    rows = {}
    for task in TASKS:
        loss = mse_loss(model.heads[task](z), targets[task])
        rows[task] = torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)])
    return rows


def test_parts_are_unfrozen_from_the_top_and_rows_follow() -> None:
    weighting, steps, trained = fixed({"a": 0.5, "b": 2.0}, "gramian", weighs_heads=False), Steps(), Trained()
    fit(small(optimizer=SGD), loader(batch(8)), max_epochs=4, callbacks=[FROM_THE_TOP(), weighting, steps, trained])
    ends = {"heads.a", "heads.b"}
    assert trained.graded == [ends, ends | {"trunk.2"}, *[ends | {"trunk.2", "trunk.0"}] * 2]
    assert len(weighting.asked) == 3  # not in the first epoch, which has no shared parameter to measure
    assert torch.equal(steps.weights[0], torch.ones(2))  # type: ignore[arg-type]
    for epoch, signals in enumerate(weighting.asked, start=1):
        rows = torch.stack(list(plain_gradients(trained.before[epoch], trained.graded[epoch]).values()))
        assert signals.gramian is not None
        torch.testing.assert_close(signals.gramian, (rows @ rows.T).double(), rtol=1e-5, atol=1e-9)
        combined = torch.tensor([0.5, 2.0]) @ rows
        names = [name for name, g in steps.gradients[epoch].items() if name.startswith("trunk") and g is not None]
        applied = torch.cat([steps.gradients[epoch][name].flatten() for name in names])  # type: ignore[union-attr]
        torch.testing.assert_close(applied, combined, rtol=1e-5, atol=1e-8)


def test_what_is_frozen_does_not_move() -> None:
    trained = Trained()
    optimizer = functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5)
    schedule = GradualUnfreezing({2: "trunk.2"})
    fit(small(optimizer=optimizer), loader(batch(8)), max_epochs=4, callbacks=[schedule, trained])
    assert all(torch.equal(trained.before[0]["trunk.0.weight"], before["trunk.0.weight"]) for before in trained.before)
    weights = [before["trunk.2.weight"] for before in trained.before]
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[2], weights[3])


@pytest.mark.parametrize("weighting", [DWA, MGDA, functools.partial(MGDA, at="features"), GradNorm, GradDrop], ids=str)
def test_a_trunk_unfrozen_from_the_start_is_no_change(weighting: Callable[..., Any]) -> None:
    ends = []
    for callbacks in ([], [GradualUnfreezing({0: "trunk"})]):
        history = History()
        fit(small(optimizer=SGD), loader(batch(8)), max_epochs=3, callbacks=[*callbacks, weighting(), history])
        ends.append(history.parameters[-1])
    assert torch.equal(*ends)


def test_learning_rates_by_depth_under_a_scheduler() -> None:
    scheduler = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5)
    history, trained = History(), Trained()
    callbacks = [FROM_THE_TOP(lr_decay=0.5), history, trained]
    module = small(optimizer=SGD, lr_scheduler=scheduler)
    fit(module, loader(batch(8)), max_epochs=4, callbacks=callbacks)
    # After the scheduler has stepped. trunk.2 is unfrozen first, trunk.0 second; the heads follow in the optimizer.
    assert history.rates[0] == pytest.approx([0.025, 0.0125, 0.05, 0.05])
    assert history.rates[3] == pytest.approx([r / 16 for r in (0.05, 0.025, 0.1, 0.1)])
    rows = plain_gradients(trained.before[2], trained.graded[2])
    lower = sum(rows.values()).split([12, 4, 16, 4])[0]  # type: ignore[union-attr]
    moved = (trained.before[2]["trunk.0.weight"] - trained.before[3]["trunk.0.weight"]).flatten()
    torch.testing.assert_close(moved, 0.025 / 4 * lower, rtol=1e-4, atol=1e-8)


def test_parameter_groups_of_a_module_with_its_own_optimizer() -> None:
    class Own(MultiTaskModule):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameter_groups(1e-2, trunk_lr=1e-3))
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)]

    module, history = Own(heads=heads(), trunk=small().trunk, tasks=regressions()), History()
    callbacks = [FROM_THE_TOP(lr_factors=[0.5, 0.1]), TaskLearningRate(Importance({"a": 2.0})), history]
    fit(module, loader(batch(8)), max_epochs=3, callbacks=callbacks)
    assert history.rates[-1] == pytest.approx([5e-4, 1e-4, 1e-2, 1e-2])
    assert module.depths == ()


def test_automatic_optimization_and_accumulation() -> None:
    ends = []
    for automatic in (False, True):
        module = small(optimizer=SGD, accumulate_grad_batches=1 if automatic else 2)
        module.automatic_optimization = automatic
        settings = {"accumulate_grad_batches": 2} if automatic else {}
        history = History()
        callbacks = [FROM_THE_TOP(lr_decay=0.5), MGDA(at="features"), history]
        fit(module, loader(batch(8), batch(8, 6)), max_epochs=4, callbacks=callbacks, **settings)
        ends.append(history.parameters[-1])
    torch.testing.assert_close(*ends)


def test_frozen_batch_normalization_keeps_its_statistics() -> None:
    def build() -> MultiTaskModule:
        torch.manual_seed(0)
        trunk = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        return MultiTaskModule(trunk, heads(), regressions(), optimizer=SGD)

    def norm(module: MultiTaskModule) -> nn.BatchNorm1d:
        found = module.get_submodule("trunk.1")
        assert isinstance(found, nn.BatchNorm1d)
        return found

    modes: list[bool] = []

    class Modes(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            modes.append(norm(pl_module).training)

    module = build()
    data = loader(batch(8))
    fit(module, data, data, max_epochs=4, callbacks=[GradualUnfreezing({1: "trunk.2", 2: "trunk"}), Modes()])
    assert modes == [False, False, True, True]
    assert norm(module).num_batches_tracked == 2
    module = build()
    fit(module, data, data, max_epochs=2, callbacks=[GradualUnfreezing({5: "trunk"}, train_bn=True)])
    assert norm(module).num_batches_tracked == 2
    assert not torch.equal(norm(module).weight, torch.ones(4))


def test_a_model_is_as_trainable_afterwards_as_before() -> None:
    module = small(optimizer=SGD)
    module.trunk[0].bias.requires_grad_(False)  # type: ignore[index]
    schedule = GradualUnfreezing({1: "trunk.0"})
    fit(module, loader(batch(8)), max_epochs=2, callbacks=[schedule])
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    assert frozen == ["trunk.0.bias"]
    trained = Trained()
    fit(module, loader(batch(8)), max_epochs=1, callbacks=[schedule, trained])  # begins anew
    assert trained.graded == [{"heads.a", "heads.b"}]


def test_learning_rates_are_logged_by_part() -> None:
    from lightning.pytorch.callbacks import LearningRateMonitor

    logger = Memory()
    callbacks = [FROM_THE_TOP(lr_decay=0.5), LearningRateMonitor()]
    fit(
        small(optimizer=SGD, lr_scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)),
        loader(batch(8)),
        callbacks=callbacks,
        logger=logger,
        log_every_n_steps=1,
    )
    names = {name for _, line in logger.lines for name in line}
    assert {"lr-SGD/trunk/2", "lr-SGD/trunk/0", "lr-SGD/head/a"} <= names
