"""The module in use: with and without a subclass, its hooks, copies and checkpoints."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_mtl import MultiTaskModule, Task, Weighting
from lightning_mtl.weighting import MGDA, GradNorm, StaticWeights
from tests.small import TASKS, batch, batches, binary, heads, regressions, small, trunk
from tests.training import Steps, fit, flat_parameters, loader, quiet_trainer
from tests.weightings import WeightedSum, fixed

WEIGHTS = {"a": 0.5, "b": 2.0}
WEIGHTINGS: dict[str, Any] = {
    "none": lambda: None,
    "losses": lambda: StaticWeights(WEIGHTS),
    "trunk": lambda: fixed(WEIGHTS, "gramian"),
    "features": lambda: fixed(WEIGHTS, "gramian", at="features"),
    "last_layer": lambda: fixed(WEIGHTS, "norms", at="last_layer"),
    "aggregator": lambda: WeightedSum(WEIGHTS),
}


class Own(MultiTaskModule):
    """What a newcomer writes."""

    def __init__(self) -> None:
        super().__init__(trunk=trunk(), heads=heads(), tasks=regressions())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def test_a_subclass_learns() -> None:
    given = loader(*batches(8, 8))
    before = quiet_trainer().validate(module := Own(), given, verbose=False)[0]["val/loss/total"]
    fit(module, given, max_epochs=30)
    assert quiet_trainer().validate(module, given, verbose=False)[0]["val/loss/total"] < 0.7 * before


def test_no_subclass_is_needed() -> None:
    module = MultiTaskModule(
        trunk(),
        heads(),
        regressions(),
        optimizer=functools.partial(torch.optim.SGD, lr=0.1),
        lr_scheduler=functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1),
    )
    before = flat_parameters(module)
    trainer = fit(module, loader(*batches(4, 4)), callbacks=[GradNorm()])
    assert not torch.equal(before, flat_parameters(module))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)


def test_the_default_optimizer_is_adam() -> None:
    assert isinstance(MultiTaskModule(trunk(), heads(), regressions()).configure_optimizers(), torch.optim.Adam)


def test_forward_and_the_order_of_tasks() -> None:
    shuffled = dict(reversed(heads().items()))
    module = MultiTaskModule(trunk(), shuffled, regressions())
    assert list(module.heads) == list(module(torch.ones(2, 3))) == list(TASKS)
    assert module.heads["a"] is shuffled["a"]
    assert [id(p) for p in module.shared_parameters()] == [id(p) for p in module.trunk.parameters()]


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightnings_hooks_fire_once_a_micro_batch(name: str, accumulate: int) -> None:
    class Counting(pl.Callback):
        def __init__(self) -> None:
            self.backward = self.steps = 0

        def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.backward += 1

        def on_before_optimizer_step(self, *_: Any) -> None:
            self.steps += 1

    counting, weighting = Counting(), WEIGHTINGS[name]()
    callbacks = [counting] if weighting is None else [counting, weighting]
    trainer = fit(small(accumulate_grad_batches=accumulate), loader(*batches(2, 2, 2, 2)), callbacks=callbacks)
    assert counting.backward == 4  # as in automatic optimization, also where gradients are kept until the step's end
    assert counting.steps == trainer.global_step == 4 // accumulate


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_the_step_returns_the_loss_that_was_descended(name: str) -> None:
    class Outputs(pl.Callback):
        loss: Tensor

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any) -> None:
            self.loss = outputs["loss"] if isinstance(outputs, dict) else outputs

    module, given, outputs, weighting = small(), batch(), Outputs(), WEIGHTINGS[name]()
    losses = {task: output.loss.item() for task, output in module.present_outputs(given).items()}
    fit(module, loader(given), callbacks=[outputs] if weighting is None else [outputs, weighting])
    weights = dict.fromkeys(TASKS, 1.0) if name in ("none", "aggregator") else WEIGHTS
    assert outputs.loss.requires_grad is False
    assert outputs.loss.item() == pytest.approx(sum(weights[task] * losses[task] for task in TASKS), rel=1e-5)


def test_hooks_overridden_without_super_lose_nothing() -> None:
    class Hooked(MultiTaskModule):
        seen: list[str]

        def configure_callbacks(self) -> Any:
            self.seen = []
            return Steps()

        def on_train_epoch_end(self) -> None:
            self.seen.append("train")

        def on_validation_epoch_end(self) -> None:
            self.seen.append("validation")

        def on_fit_start(self) -> None:
            self.seen.append("fit")

    module = binary(cls=Hooked)
    assert isinstance(module, Hooked)
    trainer = fit(module, loader(batch()), loader(batch()))
    assert module.seen == ["fit", "validation", "train"]
    assert any(isinstance(callback, Steps) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    assert {"loss_epoch/a", "val/loss/a", "val/accuracy/a"} <= trainer.callback_metrics.keys()


def test_one_module_may_be_fitted_again() -> None:
    module, weighting = small(), GradNorm(lr=0.1)
    trainer = fit(module, loader(*batches(4, 4)), callbacks=[weighting])
    learned = weighting.weights.clone()
    assert not torch.equal(learned, torch.ones(2))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(*batches(4, 4)))
    assert trainer.global_step == 4
    assert weighting.steps.tolist() == [2.0, 2.0]  # epochs go on, and the method begins anew, as the optimizer does
    fit(module, loader(batch()), callbacks=[weighting])
    assert weighting.steps.tolist() == [1.0, 1.0]  # another begins anew


class Copying(pl.Callback):
    def __init__(self) -> None:
        self.copies: list[Any] = []
        self.open: list[tuple[bool, bool]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.copies.append(copy.deepcopy(pl_module))
        assert isinstance(pl_module, MultiTaskModule)
        self.open.append((pl_module.opens_window, self.copies[-1].opens_window))


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_module_may_be_copied_during_training(name: str, accumulate: int) -> None:
    given, results = loader(*batches(4, 4, 4)), []
    copying = Copying()
    for callbacks in ([], [copying]):
        weighting: Weighting | None = WEIGHTINGS[name]()
        module = binary(accumulate_grad_batches=accumulate)
        fit(module, given, callbacks=callbacks if weighting is None else [*callbacks, weighting])
        results.append(flat_parameters(module))
    assert torch.equal(*results)
    # A copy made in the middle of a window has no part of it.
    assert copying.open == [(accumulate == 1, True), (True, True), (True, True)]
    copied = copying.copies[1]
    assert not torch.equal(flat_parameters(copied), results[1])
    before = flat_parameters(copied)
    trainer = fit(copied, given)
    assert "loss_epoch/a" in trainer.callback_metrics
    assert not torch.equal(before, flat_parameters(copied))


def test_weight_averaging() -> None:
    module = binary()
    averaging = EMAWeightAveraging(decay=0.5)
    trainer = fit(module, loader(*batches(4, 4)), loader(batch()), callbacks=[averaging, MGDA()], max_epochs=2)
    assert "val/loss/a" in trainer.callback_metrics


def test_load_from_checkpoint_of_a_subclass_without_arguments(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path)
    module = Own()
    fit(module, loader(*batches(4, 4)), callbacks=[checkpoint, GradNorm()], enable_checkpointing=True)
    loaded = Own.load_from_checkpoint(checkpoint.best_model_path)
    assert torch.equal(flat_parameters(loaded), flat_parameters(module))
    assert not loaded.automatic_optimization


def test_load_from_checkpoint_with_the_parts_as_arguments(tmp_path: Path) -> None:
    trainer = fit(module := binary(), loader(*batches(4, 4)), callbacks=[MGDA()])
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    fresh = binary()
    loaded = MultiTaskModule.load_from_checkpoint(
        tmp_path / "model.ckpt", trunk=trunk(), heads=dict(fresh.heads), tasks=fresh.tasks, gradient_clip_val=2.0
    )
    assert torch.equal(flat_parameters(loaded), flat_parameters(module))
    assert loaded.gradient_clip_val == 2.0
    torch.load(tmp_path / "model.ckpt", weights_only=True)


class Saving(MultiTaskModule):
    """Its parts are made from hyperparameters."""

    def __init__(self, width: int, names: list[str]) -> None:
        self.save_hyperparameters()
        tasks = {name: Task(mse_loss) for name in names}
        super().__init__(nn.Linear(3, width), {name: nn.Linear(width, 1) for name in names}, tasks)


def test_load_from_checkpoint_of_a_subclass_with_hyperparameters(tmp_path: Path) -> None:
    trainer = fit(Saving(5, ["a", "b"]), loader(batch()))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = Saving.load_from_checkpoint(tmp_path / "model.ckpt")
    assert list(loaded.tasks) == ["a", "b"]
    assert loaded.trunk.weight.shape == (5, 3)
