"""What works under Lightning's automatic optimization works here, or is refused with what to do instead."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.weighting import DWA, GradNorm
from tests.small import batch, batches, small
from tests.training import Memory, fit, flat_parameters, loader, quiet_trainer

SOME = batches(4, 4, 2, 3, 4)


def in_mode(module: MultiTaskModule, *, automatic: bool) -> MultiTaskModule:
    module.automatic_optimization = automatic
    return module


# The mode, and the Trainer's arguments


class SetBefore(MultiTaskModule):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.automatic_optimization = True
        super().__init__(*args, **kwargs)


class SetOnTheClass(MultiTaskModule):
    automatic_optimization = True


@pytest.mark.parametrize("cls", [SetBefore, SetOnTheClass])
def test_automatic_optimization_may_be_chosen_before_construction(cls: type[MultiTaskModule]) -> None:
    module = small(cls=cls)
    assert module.automatic_optimization
    assert fit(module, loader(*SOME), accumulate_grad_batches=5).global_step == 1
    assert not small().automatic_optimization


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=2"),
        ({"gradient_clip_val": 0.5}, r"gradient_clip_val=0\.5"),
        ({"gradient_clip_algorithm": "value"}, "gradient_clip_algorithm='value'"),
    ],
)
def test_the_trainers_arguments_are_the_modules(given: dict[str, Any], named: str) -> None:
    message = rf"Trainer\({named}\) is not applied.*MultiTaskModule\(\.\.\., {named}\), or set automatic_optimization"
    with pytest.raises(ValueError, match=message):
        fit(small(), loader(*SOME), **given)
    quiet_trainer(**given).validate(small(), loader(*SOME), verbose=False)
    fit(in_mode(small(), automatic=True), loader(*SOME), **given)


# Total steps


class OneCycle(MultiTaskModule):
    """Lightning's recipe of a schedule that ends with the training."""

    planned: float

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        self.planned = self.trainer.estimated_stepping_batches
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=int(self.planned))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


def test_total_steps_follow_the_modules_accumulation() -> None:
    found = []
    for automatic in (False, True):
        module = in_mode(small(cls=OneCycle, accumulate_grad_batches=1 if automatic else 2), automatic=automatic)
        logger = Memory()
        trainer = fit(
            module,
            loader(*SOME),
            max_epochs=3,
            logger=logger,
            log_every_n_steps=1,
            accumulate_grad_batches=2 if automatic else 1,
        )
        assert isinstance(module, OneCycle)
        assert module.planned == trainer.global_step == 9
        found.append(
            (trainer.optimizers[0].param_groups[0]["lr"], [step for step, line in logger.lines if "loss/a" in line])
        )
        assert trainer.accumulate_grad_batches == (2 if automatic else 1)
    assert found[0][0] == pytest.approx(found[1][0])
    assert found[0][1] == found[1][1]


# The average of weights


@pytest.mark.parametrize("automatic", [False, True])
def test_an_average_of_weights_is_not_trained_away(automatic: bool) -> None:
    class Average(pl.Callback):
        seen: Tensor | None = None

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if trainer.current_epoch == 3 and self.seen is None:
                self.seen = flat_parameters(pl_module)

    module, average = in_mode(small(optimizer=lambda p: torch.optim.SGD(p, lr=0.1)), automatic=automatic), Average()
    module.trunk = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh())
    weighting = DWA()
    swa = StochasticWeightAveraging(0.1, swa_epoch_start=1, annealing_epochs=1)
    fit(module, loader(*SOME), callbacks=[swa, average, weighting], max_epochs=3)
    assert average.seen is not None
    assert torch.equal(average.seen, flat_parameters(module))
    norm = module.trunk[1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.num_batches_tracked == 5


# Several runs


def test_fit_and_test_with_one_trainer_without_a_warning() -> None:
    trainer, module = quiet_trainer(), small()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader(*SOME))
        trainer.test(module, loader(*SOME), verbose=False)
    assert not [str(one.message) for one in caught if "callbacks" in str(one.message)]
    assert len([callback for callback in trainer.callbacks if callback is module.recorder]) == 1  # type: ignore[attr-defined]


def test_a_fit_starts_with_a_method_and_counts_of_its_own() -> None:
    def broken(prediction: Tensor, target: Tensor) -> Tensor:
        return mse_loss(prediction, target) * (torch.nan if target.shape[0] == 3 else 1.0)

    weighting, module = GradNorm(), small()
    module.tasks["a"] = Task(broken)
    initial = {name: value.clone() for name, value in module.state_dict().items()}
    states = []
    one = quiet_trainer(callbacks=[weighting])
    for trainer in (one, one, quiet_trainer(callbacks=[weighting])):
        module.load_state_dict(initial)
        trainer.fit_loop.max_epochs = trainer.current_epoch + 1
        with pytest.warns(UserWarning, match="not finite"):
            trainer.fit(module, loader(*SOME))
        assert module.optimization.update.skipped == 1
        states.append(weighting.weights.clone())
    assert one.current_epoch == 2
    for state in states[1:]:
        torch.testing.assert_close(state, states[0])
    assert len(states[0].unique()) == 2


@pytest.mark.parametrize("stage", ["fit", "validate", "test"])
def test_several_loaders_are_refused_before_the_first_batch(stage: str) -> None:
    class Untouched(MultiTaskModule):
        def task_losses(self, batch: Any) -> Any:
            raise AssertionError("a batch was used")

    module, loaders = small(cls=Untouched), [loader(batch()), loader(batch())]
    trainer = quiet_trainer(num_sanity_val_steps=1)
    run = functools.partial(getattr(trainer, stage), module)
    with pytest.raises(ValueError, match="Several evaluation loaders"):
        run(loader(batch()), loaders) if stage == "fit" else run(loaders)


# What callbacks and schedulers read


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")  # on every save, by Lightning
@pytest.mark.parametrize("weighting", [None, GradNorm()])
def test_this_steps_values_are_read_whatever_is_logged(weighting: GradNorm | None, tmp_path: Path) -> None:
    class Reading(pl.Callback):
        read: list[float]

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            self.read.append(float(trainer.callback_metrics["loss/a"]))

    class Plateau(MultiTaskModule):
        seen: list[float]

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            followed = {"scheduler": plateau, "interval": "step", "monitor": "loss/a"}
            return {"optimizer": optimizer, "lr_scheduler": followed}

        def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
            self.seen.append(float(metric))

    logger, reading, module = Memory(), Reading(), small(cls=Plateau)
    assert isinstance(module, Plateau)
    reading.read, module.seen = [], []
    checkpoint = ModelCheckpoint(tmp_path, "{step}", monitor="loss/a", every_n_train_steps=1, save_top_k=-1)
    callbacks = [reading, checkpoint, *([] if weighting is None else [weighting])]
    trainer = quiet_trainer(
        callbacks=callbacks, enable_checkpointing=True, log_every_n_steps=50, logger=logger, num_sanity_val_steps=1
    )
    trainer.fit(module, loader(*SOME), loader(*SOME))
    saved = sorted((path, float(score)) for path, score in checkpoint.best_k_models.items())
    assert len(set(reading.read)) == 5
    assert module.seen == reading.read
    assert [score for _, score in saved] == reading.read
