"""The data module under a Trainer: what the module sees, names of evaluation, workers, Trainer's arguments."""

from __future__ import annotations

import gc
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.tuner.tuning import Tuner
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_mtl import MultiTaskModule
from lightning_mtl.data import Joint, MultiTaskDataModule, Proportional, Ratios, RoundRobin, Schedule
from lightning_mtl.weighting import MGDA, GradNorm
from tests.loaders.samples import Numbered, counted, module, seen_in, train
from tests.small import binary
from tests.training import fit, flat_parameters, loader, quiet_trainer

SIZES = {"a": 21, "b": 8, "c": 3}
TASKS = tuple(SIZES)


def datasets() -> dict[str, Numbered]:
    return {task: Numbered(size) for task, size in SIZES.items()}


def data(**arguments: Any) -> MultiTaskDataModule:
    settings: dict[str, Any] = {"train": datasets(), "batch_size": 4}
    return MultiTaskDataModule(**(settings | arguments))


@pytest.mark.parametrize(
    ("mixing", "steps"),
    [(Joint(), 6), (RoundRobin(), 18), (Proportional(), 9), (Ratios({"a": 1, "b": 1, "c": 1}), 9)],
    ids=repr,
)
def test_a_fit_sees_what_the_mode_says(mixing: Any, steps: int) -> None:
    watch = train(data(mixing=mixing), tasks=TASKS, max_epochs=2)
    assert [len(epoch) for epoch in watch.epochs] == [steps, steps]
    assert watch.epochs[0] != watch.epochs[1]
    for task, found in counted(watch.steps).items():
        often = [found[number] for number in range(SIZES[task])]
        assert max(often) - min(often) <= 1


def test_a_schedule_takes_its_turns() -> None:
    schedule = Schedule({0: Joint(), 1: Ratios({"a": 0, "b": 0, "c": 1}), 2: RoundRobin()})
    watch = train(data(mixing=schedule, steps_per_epoch=4), tasks=TASKS, max_epochs=3)
    found = [[tuple(step) for step in epoch] for epoch in watch.epochs]
    assert found == [[TASKS] * 4, [("c",)] * 4, [("a",), ("b",), ("c",), ("a",)]]


def test_training_is_that_of_the_same_batches_by_hand() -> None:
    made = data(mixing=Joint())
    by_loader = module(TASKS)
    quiet_trainer().fit(by_loader, datamodule=made)
    by_hand = module(TASKS)
    fit(by_hand, loader(*data(mixing=Joint()).train_dataloader()))
    assert torch.equal(flat_parameters(by_loader), flat_parameters(by_hand))


@pytest.mark.parametrize("weighting", [GradNorm, MGDA], ids=lambda make: make.__name__)
def test_tasks_that_take_turns_are_weighed_together_in_a_window(weighting: Any) -> None:
    model = module(TASKS, accumulate_grad_batches=3)
    trainer = quiet_trainer(callbacks=[weighting()])
    trainer.fit(model, datamodule=data(mixing=RoundRobin()))
    assert trainer.global_step == 6
    assert {f"weight/{task}" for task in TASKS} <= trainer.callback_metrics.keys()


def test_figures_and_predictions_keep_the_names() -> None:
    model = binary(tasks=TASKS)
    evaluated = {"a": Numbered(7), "c": Numbered(3)}
    made = data(val=evaluated, test=evaluated, predict={"b": Numbered(9), "c": TensorDataset(torch.randn(5, 3))})
    trainer = quiet_trainer()
    trainer.fit(model, datamodule=made)
    named = {name for name in trainer.callback_metrics if name.startswith("val/")}
    assert named == {"val/loss/total"} | {
        f"val/{kind}/{task}" for kind in ("loss", "error", "accuracy") for task in "ac"
    }
    (tested,) = trainer.test(model, datamodule=made, verbose=False)
    for task, dataset in evaluated.items():
        inputs, targets = (
            torch.stack(part) for part in zip(*map(dataset.__getitem__, range(len(dataset))), strict=True)
        )
        with torch.no_grad():
            loss = torch.nn.functional.mse_loss(model(inputs)[task], targets)
        assert tested[f"test/loss/{task}"] == pytest.approx(float(loss), rel=1e-5)
    predictions = trainer.predict(model, datamodule=made)
    assert predictions is not None
    assert [{task: len(y) for task, y in step.items()} for step in predictions] == [  # type: ignore[union-attr]
        {"b": 4, "c": 4},
        {"b": 4, "c": 1},
        {"b": 1},
    ]


def test_limits_count_steps_of_all_tasks() -> None:
    made = data(val=datasets())
    model = binary(tasks=TASKS)
    trainer = quiet_trainer(limit_train_batches=2, limit_val_batches=1)
    trainer.fit(model, datamodule=made)
    assert trainer.global_step == 2
    assert {f"val/loss/{task}" for task in TASKS} <= trainer.callback_metrics.keys()


def test_a_limited_epoch_leaves_the_rest_to_the_next() -> None:
    watch = train(data(), tasks=TASKS, max_epochs=3, limit_train_batches=2)
    assert counted(watch.steps)["a"] == Counter(dict.fromkeys(range(21), 1))


def test_no_validation_data_is_no_validation() -> None:
    trainer = quiet_trainer(num_sanity_val_steps=2)
    trainer.fit(module(TASKS), datamodule=data())
    assert not any(name.startswith("val") for name in trainer.callback_metrics)
    with pytest.raises(ValueError, match=re.escape("give it val={task: dataset}")):
        trainer.validate(module(TASKS), datamodule=data())


def test_a_second_fit_begins_anew() -> None:
    made = data()
    assert train(made, tasks=TASKS).epochs == train(made, tasks=TASKS).epochs


def test_by_hand_every_loader_begins_anew() -> None:
    made = data()
    assert list(map(seen_in, made.train_dataloader())) == list(map(seen_in, made.train_dataloader()))


def test_the_seed_is_that_of_seed_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert train(data(), tasks=TASKS).epochs == train(data(seed=5), tasks=TASKS).epochs
    monkeypatch.setenv("PL_GLOBAL_SEED", "6")
    assert train(data(), tasks=TASKS).epochs != train(data(seed=5), tasks=TASKS).epochs


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(data().train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_change_nothing() -> None:
    plain = data(val=datasets())
    working = data(val=datasets(), num_workers={"a": 2, "b": 1, "c": 0}, persistent_workers=True)
    assert train(plain, tasks=TASKS, max_epochs=2).epochs == train(working, tasks=TASKS, max_epochs=2).epochs


def test_overfitting_repeats_the_same_batches_in_order() -> None:
    with pytest.warns(UserWarning, match="You requested to overfit"):
        watch = train(data(mixing=Proportional()), tasks=TASKS, max_epochs=3, overfit_batches=4)
    assert watch.epochs[0] == watch.epochs[1] == watch.epochs[2]
    assert len(watch.epochs[0]) == 4


def test_loaders_reloaded_each_epoch_go_on() -> None:
    plain = train(data(mixing=Proportional()), tasks=TASKS, max_epochs=3)
    reloaded = train(data(mixing=Proportional()), tasks=TASKS, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert plain.epochs == reloaded.epochs


class Tuned(MultiTaskModule):
    lr = 0.01

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def test_tuners_leave_the_order_as_it_was(tmp_path: Any) -> None:
    gc.freeze()  # tuners collect garbage again and again, and need not look at what earlier tests have left
    expected = train(data(), tasks=TASKS).epochs
    made, model = data(), module(TASKS, cls=Tuned)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Tuner(quiet_trainer(default_root_dir=tmp_path)).lr_find(model, datamodule=made, num_training=5)
        assert train(made, tasks=TASKS).epochs == expected
        # Lightning's finder asks every data module for validation data.
        scaled = data(batch_size=2, val=datasets())
        Tuner(quiet_trainer(default_root_dir=tmp_path)).scale_batch_size(
            model, datamodule=scaled, init_val=2, max_trials=2, steps_per_trial=1
        )
    assert scaled.batch_size == 4
    assert len(train(scaled, tasks=TASKS).steps) == 6


class Late(MultiTaskDataModule):
    """Makes its datasets when they are asked for."""

    def task_data(self, stage: str) -> Mapping[str, Dataset[Any]] | None:
        return datasets() if stage == "train" else None


def test_datasets_can_be_made_late() -> None:
    assert train(Late(batch_size=4), tasks=TASKS).epochs == train(data(), tasks=TASKS).epochs


def test_a_plain_dict_of_evaluation_loaders_keeps_the_names_too() -> None:
    model, trainer = binary(tasks=TASKS), quiet_trainer()
    loaders = {task: DataLoader(dataset, batch_size=4) for task, dataset in datasets().items()}
    expected, *_ = trainer.validate(model, datamodule=data(val=datasets()), verbose=False)
    found = trainer.validate(model, loaders, verbose=False)
    assert {name: value for each in found for name, value in each.items()} == pytest.approx(expected)
    predictions: Any = trainer.predict(model, loaders)
    assert [[list(step) for step in each] for each in predictions] == [[["a"]] * 6, [["b"]] * 2, [["c"]]]
    alone: Any = {"b": torch.randn(4, 3), "c": torch.randn(2, 3)}  # inputs without targets
    inputs: Any = trainer.predict(model, {task: DataLoader(x, batch_size=2) for task, x in alone.items()})
    assert [[list(step) for step in each] for each in inputs] == [[["b"]] * 2, [["c"]]]


def test_any_module_may_use_it() -> None:
    class Plain(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": self.layer(batch["a"][0].new_zeros(1, 32)).sum()}

    trainer = quiet_trainer()
    trainer.fit(Plain(), datamodule=data())
    assert trainer.global_step == 6


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("a", "b"), "train has data of ['c'], but the module's tasks are ['a', 'b']"),
        (("a", "b", "c", "d"), "train has no data of the module's tasks ['d'], only of ['a', 'b', 'c']"),
    ],
)
def test_names_that_are_not_the_modules_are_refused_before_training(names: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        quiet_trainer().fit(module(names), datamodule=data())


def test_names_are_checked_for_the_other_stages_too() -> None:
    made = MultiTaskDataModule(test={"z": Numbered(3)}, predict={"y": Numbered(3)})
    trainer: pl.Trainer = quiet_trainer()
    with pytest.raises(ValueError, match=re.escape("test has data of ['z'], but the module's tasks are ['a']")):
        trainer.test(module(["a"]), datamodule=made)
    with pytest.raises(ValueError, match=re.escape("predict has data of ['y'], but")):
        trainer.predict(module(["a"]), datamodule=made)
