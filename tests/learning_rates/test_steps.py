"""Steps that are skipped, scaled, clipped, fail or meet other callbacks: the learning rates are as they were."""

from __future__ import annotations

import functools
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.tuner.tuning import Tuner
from torch.nn.functional import mse_loss

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.learning_rates import Factor, GradientNorm, Importance, TaskLearningRate
from tests.small import TASKS, Batch, batch, heads, small, trunk
from tests.training import History, Steps, fit, flat_parameters, loader, quiet_trainer

BATCHES = [batch(4, seed) for seed in range(4)]


class Breaks(MultiTaskModule):
    """The loss of one task is not finite in the second step."""

    def task_losses(self, batch: Batch) -> Any:
        outputs: Any = super().task_losses(batch)
        if self.trainer.fit_loop.total_batch_idx == 1:
            outputs["a"].loss = outputs["a"].loss * torch.nan
        return outputs


def rates_of(module: MultiTaskModule) -> list[float]:
    return [group["lr"] for group in module.trainer.optimizers[0].param_groups]


@pytest.mark.filterwarnings("ignore:Step \\d+ is skipped:UserWarning")
@pytest.mark.parametrize("automatic", [False, True], ids=["manual", "automatic"])
def test_a_skipped_step_teaches_nothing(automatic: bool) -> None:
    rates, whole = TaskLearningRate(GradientNorm(decay=0.5)), TaskLearningRate(GradientNorm(decay=0.5))
    broken, module = small(cls=Breaks), small()
    broken.automatic_optimization = module.automatic_optimization = automatic
    fit(broken, loader(*BATCHES), callbacks=[rates])
    fit(module, loader(BATCHES[0], *BATCHES[2:]), callbacks=[whole])
    assert torch.equal(flat_parameters(broken), flat_parameters(module))
    assert torch.equal(rates.factors[0].norms, whole.factors[0].norms)  # type: ignore[attr-defined]
    assert rates_of(broken) == [1.0] * 3


@pytest.mark.filterwarnings("ignore:Step \\d+ is skipped:UserWarning")
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step\\(\\)`:UserWarning")
@pytest.mark.parametrize("automatic", [False, True], ids=["manual", "automatic"])
def test_a_gradient_scaler(automatic: bool) -> None:
    """Norms are read without the scaler's factor; a step that the scaler skips leaves no rate behind."""
    settings: dict[str, Any] = {"optimizer": functools.partial(torch.optim.SGD, lr=0.1)}
    found = []
    for factor in (1.0, 1024.0):
        scaler = torch.amp.GradScaler("cpu", init_scale=factor)
        rates, module = TaskLearningRate(GradientNorm(decay=0.5)), small(cls=Breaks, **settings)
        module.automatic_optimization = automatic
        precision = MixedPrecision("16-mixed", "cpu", scaler)
        fit(module, loader(*BATCHES), callbacks=[rates], plugins=[precision])
        assert rates_of(module) == [0.1] * 3
        found.append(rates.factors[0].norms)  # type: ignore[attr-defined]
    torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=0)  # half precision
    assert bool(torch.isfinite(found[0]).all())


@pytest.mark.parametrize("automatic", [False, True], ids=["manual", "automatic"])
def test_norms_are_those_before_clipping(automatic: bool) -> None:
    rates, steps = TaskLearningRate(GradientNorm(decay=0.0)), Steps()
    module = small(gradient_clip_val=None if automatic else 1e-3)
    module.automatic_optimization = automatic
    other = small()
    fit(module, loader(BATCHES[0]), callbacks=[rates], **({"gradient_clip_val": 1e-3} if automatic else {}))
    fit(other, loader(BATCHES[0]), callbacks=[steps])
    found = {name: gradient for name, gradient in steps.gradients[0].items() if gradient is not None}
    expected = [torch.cat([g.flatten() for name, g in found.items() if f"heads.{k}" in name]).norm() for k in TASKS]
    torch.testing.assert_close(rates.factors[0].norms, torch.stack(expected))  # type: ignore[attr-defined]


@pytest.mark.parametrize("automatic", [False, True], ids=["manual", "automatic"])
def test_a_step_that_fails_leaves_the_rates(automatic: bool, tmp_path: Any) -> None:
    class Fails(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            raise RuntimeError("out of memory")

    module = small(optimizer=functools.partial(Fails, lr=0.5))
    module.automatic_optimization = automatic

    class Saves(pl.Callback):
        def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
            trainer.save_checkpoint(tmp_path / "on_exception.ckpt")

    rates = TaskLearningRate(Importance({"a": 0.1}))
    with pytest.raises(RuntimeError, match="out of memory"):
        fit(module, loader(*BATCHES), callbacks=[Saves(), rates])
    assert rates_of(module) == [0.5] * 3
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
    assert [group["lr"] for group in saved["optimizer_states"][0]["param_groups"]] == [0.5] * 3


def test_a_rate_that_a_user_sets_in_optimizer_step_stays() -> None:
    class WarmsUp(MultiTaskModule):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(closure=optimizer_closure)
            for group in optimizer.param_groups:
                group["lr"] *= 0.5

    module, history = small(cls=WarmsUp), History()
    module.automatic_optimization = True
    fit(module, loader(*BATCHES), callbacks=[TaskLearningRate(Importance({"a": 0.1})), history])
    assert [set(found) for found in history.rates[:4]] == [{0.5}, {0.25}, {0.125}, {0.0625}]


def test_an_absent_task_keeps_head_and_state() -> None:
    rates = TaskLearningRate(GradientNorm(decay=0.5), normalize=True)
    inputs, targets = BATCHES[1]
    module, history = small(), History()
    before = [p.detach().clone() for p in module.heads["b"].parameters()]
    fit(module, loader((inputs, {"a": targets["a"]}), *BATCHES), callbacks=[rates, history], max_steps=1)
    assert rates.factors[0].norms.isnan().tolist() == [False, True]  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(before, module.heads["b"].parameters(), strict=True))


def test_a_group_that_a_callback_adds_is_scaled_too() -> None:
    class Unfreezes(BackboneFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.heads["a"])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.heads["a"], optimizer, lr=0.25)

        def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            pass

    class Trainable(MultiTaskModule):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            groups = self.parameter_groups(0.5)
            return torch.optim.SGD([group for group in groups if group["name"] != "head/a"])

    frozen, history = small(cls=Trainable), History()
    start = flat_parameters(frozen.heads["a"])
    rates = TaskLearningRate(Importance({"a": 0.0, "b": 1.0}))
    fit(frozen, loader(*BATCHES), callbacks=[Unfreezes(), rates, history], max_epochs=3)
    assert history.rates[-1] == [0.5, 0.5, 0.25]
    assert torch.equal(flat_parameters(frozen.heads["a"]), start)


def test_the_learning_rate_finder_goes_by(tmp_path: Any) -> None:
    class Tuned(MultiTaskModule):
        lr = 0.01

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameter_groups(self.lr))

    torch.manual_seed(2)
    module = Tuned(trunk(), heads(), {task: Task(mse_loss) for task in TASKS})
    rates = TaskLearningRate(GradientNorm())
    trainer = quiet_trainer(callbacks=[rates], default_root_dir=tmp_path, max_epochs=1)
    found = Tuner(trainer).lr_find(module, loader(*BATCHES * 30), num_training=20)
    assert found is not None
    assert len({round(lr, 12) for lr in found.results["lr"]}) > 10
    trainer.fit(module, loader(*BATCHES))
    assert len(set(rates_of(module))) == 1


def test_two_fits_with_one_callback_begin_anew() -> None:
    class Counts(Factor):
        def __init__(self) -> None:
            super().__init__()
            self.add_state("steps", torch.tensor(0.0), per_task=False)
            self.steps: torch.Tensor

        def update(self, signals: Any) -> None:
            self.steps = self.steps + 1

        def values(self) -> torch.Tensor:
            return torch.ones(len(self.tasks))

    factor = Counts()
    rates = TaskLearningRate(factor)
    for _ in range(2):
        fit(small(), loader(*BATCHES), callbacks=[rates])
        assert factor.steps == len(BATCHES)
