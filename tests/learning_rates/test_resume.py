"""Interrupted in the middle of an epoch and resumed: to the bit what the uninterrupted run does."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_mtl import MultiTaskModule
from lightning_mtl.learning_rates import GradientNorm, Importance, Relatedness, TaskLearningRate
from lightning_mtl.weighting import MGDA
from tests.small import batch, binary
from tests.training import Batches, Memory, fit, flat_parameters

# torchdata's loader calls what torch has deprecated: nothing of ours.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")

TASKS = ("a", "b", "c")
DATA = [batch(4, seed, TASKS) for seed in range(6)]
SAVED_AFTER = 9  # in the second epoch of three, of six batches each

MAKES: dict[str, Callable[[], TaskLearningRate]] = {
    "combined": lambda: TaskLearningRate([Importance(metric="accuracy"), GradientNorm(), Importance({"b": 0.5})]),
    "cosines": lambda: TaskLearningRate(
        [Relatedness("gradient_cosine"), GradientNorm(of="shared")], shares_trunk=True, every_n_steps=4, normalize=True
    ),
    "targets": lambda: TaskLearningRate(Relatedness("target_correlation", samples=40)),
    "predictions": lambda: TaskLearningRate(Relatedness("prediction_mutual_information", samples=30), bounds=(0.1, 2)),
}


class Saving(pl.Callback):
    def __init__(self, path: Path | None) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.path is not None and trainer.fit_loop.total_batch_idx + 1 == SAVED_AFTER:
            trainer.save_checkpoint(self.path)


class Scheduled(MultiTaskModule):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameter_groups(0.05, head_lr={"b": 0.02}))
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(rates: TaskLearningRate, save: Path | None = None, ckpt: Path | None = None) -> tuple[Tensor, Memory]:
    module, logger = binary(cls=Scheduled, tasks=TASKS), Memory()
    data: Any = StatefulDataLoader(Batches(DATA), batch_size=None)
    callbacks = [rates, Saving(save), MGDA()]
    val = DataLoader(Batches(DATA[:2]), batch_size=None)
    settings: dict[str, Any] = {"max_epochs": 3, "logger": logger, "log_every_n_steps": 1}
    fit(module, data, val, callbacks=callbacks, ckpt_path=ckpt, **settings)
    return flat_parameters(module), logger


def flat_state(state: Any) -> list[Any]:
    if isinstance(state, Tensor):
        return [state.nan_to_num(7.0).tolist() if state.is_floating_point() else state.tolist()]
    entries = state.values() if isinstance(state, dict) else state if isinstance(state, list) else None
    return [state] if entries is None else [value for entry in entries for value in flat_state(entry)]


@pytest.mark.parametrize("name", MAKES)
def test_resumed_runs_are_the_same_to_the_bit(name: str, tmp_path: Path) -> None:
    whole, resumed = MAKES[name](), MAKES[name]()
    expected, lines = train(whole, save=tmp_path / "middle.ckpt")
    saved = torch.load(tmp_path / "middle.ckpt", weights_only=True)
    rates = [group["lr"] for group in saved["optimizer_states"][0]["param_groups"]]
    assert rates == pytest.approx([lr * 0.9**SAVED_AFTER for lr in (0.05, 0.05, 0.02, 0.05)])
    found, rest = train(resumed, ckpt=tmp_path / "middle.ckpt")
    assert found.tolist() == expected.tolist()
    assert flat_state(resumed.state_dict()) == flat_state(whole.state_dict())
    logged = [(step, line) for step, line in lines.lines if "lr/a" in line and step >= SAVED_AFTER]
    again = [(step, line) for step, line in rest.lines if "lr/a" in line and step >= SAVED_AFTER]
    assert len(again) > 8
    assert again == logged
    assert len({line["lr/a"] / 0.9**step for step, line in logged}) > 1


def test_checkpoints_of_other_factors_are_refused_and_those_without_begin_anew(tmp_path: Path) -> None:
    module = binary(cls=Scheduled)
    make = functools.partial(Batches, [batch(4, seed) for seed in range(3)])
    trainer = fit(module, DataLoader(make(), batch_size=None), callbacks=[TaskLearningRate(GradientNorm())])
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    again = DataLoader(make(), batch_size=None)
    message = "TaskLearningRate held ['GradientNorm'], this one holds ['Importance']"
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(
            binary(cls=Scheduled),
            again,
            callbacks=[TaskLearningRate(Importance({"a": 2.0}))],
            ckpt_path=tmp_path / "one.ckpt",
            max_epochs=2,
        )
    plain = fit(binary(cls=Scheduled), again)
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    rates = TaskLearningRate(Importance({"a": 2.0}))
    fit(binary(cls=Scheduled), again, callbacks=[rates], ckpt_path=tmp_path / "plain.ckpt", max_epochs=2)
    assert rates.multipliers.tolist() == [2.0, 1.0]
