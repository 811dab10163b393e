"""The fraction of labels is logged once, exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.nn.functional import mse_loss
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_mtl import MaskedTarget, MultiTaskModule, Task
from lightning_mtl.weighting import FAMO
from tests.small import batch, heads, small, trunk
from tests.training import Batches, Memory, fit, loader

NAN = torch.nan


def module(missing: float | None = None) -> MultiTaskModule:
    return MultiTaskModule(trunk(), heads(), {task: Task(mse_loss, missing=missing) for task in "ab"})


def labeled(lines: list[tuple[int, dict[str, float]]]) -> list[dict[str, float]]:
    found = [{k: v for k, v in line.items() if k.startswith("labeled/")} for _, line in lines]
    return [line for line in found if line]


def holes(*present: int, size: int = 4) -> Any:
    """Joint batches; task a has so many labels in each, b all of them."""
    given = []
    for index, count in enumerate(present):
        inputs, targets = batch(size, index)
        targets["a"][count:] = NAN
        given.append((inputs, targets))
    return given


def test_it_is_logged_once_and_is_in_callback_metrics() -> None:
    memory = Memory()
    given = [*holes(1, 4), *holes(0, size=2)]
    evaluated = loader(*holes(4, 4, 4))  # not counted: the fraction is that of the training data
    trainer = fit(module(NAN), loader(*given), evaluated, max_epochs=3, logger=memory, log_every_n_steps=1)
    assert labeled(memory.lines) == [pytest.approx({"labeled/a": 0.5, "labeled/b": 1.0})]
    assert float(trainer.callback_metrics["labeled/a"]) == 0.5


def test_a_second_look_at_the_losses_does_not_count() -> None:
    trainer = fit(module(NAN), loader(*holes(1, 4)), callbacks=[FAMO()], accumulate_grad_batches=1)
    assert float(trainer.callback_metrics["labeled/a"]) == 5 / 8


def test_batches_without_a_task_count_as_unlabeled() -> None:
    inputs, targets = batch(4)
    given = [(inputs, targets), (inputs[:2], {"a": targets["a"][:2]}), (inputs[:2], {**targets, "a": None})]
    trainer = fit(module(), loader(given[0], given[1], (inputs[:2], {"a": None, "b": targets["b"][:2]})))
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("labeled/")}
    assert found == {"labeled/a": 6 / 8, "labeled/b": 6 / 8}


def test_masks_count_and_tasks_that_are_complete_are_not_mentioned() -> None:
    inputs, targets = batch(4)
    masked = MaskedTarget(targets["a"], torch.tensor([True, False, False, False]))
    trainer = fit(module(), loader((inputs, {"a": masked, "b": targets["b"]})))
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("labeled/")}
    assert found == {"labeled/a": 0.25}
    complete = fit(small(), loader(batch()))
    assert not [name for name in complete.callback_metrics if name.startswith("labeled/")]


def test_a_second_fit_counts_anew() -> None:
    model = module(NAN)
    assert float(fit(model, loader(*holes(1))).callback_metrics["labeled/a"]) == 0.25
    assert float(fit(model, loader(*holes(3))).callback_metrics["labeled/a"]) == 0.75


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata's
def test_an_interrupted_first_epoch_is_counted_to_its_end(tmp_path: Path) -> None:
    def data() -> Any:
        return StatefulDataLoader(Batches(holes(1, 2, 4, 4)), batch_size=None)

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "halfway.ckpt")

    fit(module(NAN), data(), callbacks=[Keep()])
    resumed = fit(module(NAN), data(), ckpt_path=tmp_path / "halfway.ckpt")
    assert resumed.global_step == 4
    assert float(resumed.callback_metrics["labeled/a"]) == 11 / 16
