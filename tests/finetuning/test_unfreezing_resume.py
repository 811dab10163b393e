"""Runs interrupted while a trunk is unfrozen go on to the bit as the uninterrupted ones, with every weighting."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_mtl import Weighting
from lightning_mtl.finetuning import GradualUnfreezing
from lightning_mtl.weighting import DTP, MGDA
from lightning_mtl.weighting.row_memory import RowMemory
from tests.contract import habits, one_of_each
from tests.contract_rows import METHODS
from tests.small import Batch, batch, binary
from tests.training import fit, flat_parameters

# torchdata's loader calls what torch has deprecated: nothing of ours.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")

TASKS = ("a", "b", "c")
EPOCHS, STEPS = 3, 2
ADAM = functools.partial(torch.optim.Adam, lr=0.05)


class Samples(Dataset[Batch]):
    def __init__(self) -> None:
        self.inputs, self.targets = batch(4 * STEPS, 11, TASKS)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Batch:
        return self.inputs[index], {task: target[index] for task, target in self.targets.items()}


class Saving(pl.Callback):
    def __init__(self, path: Path, after: int) -> None:
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.after % STEPS and trainer.fit_loop.total_batch_idx + 1 == self.after:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if (trainer.current_epoch + 1) * STEPS == self.after:
            trainer.save_checkpoint(self.path)


def train(
    weighting: Weighting | None, *callbacks: pl.Callback, ckpt: Path | None = None, **arguments: Any
) -> tuple[Tensor, dict[str, Any]]:
    """Parameters and the weighting's state after a layer was unfrozen in the second and one in the third epoch."""
    torch.manual_seed(0)
    module = binary(tasks=TASKS, optimizer=ADAM, **arguments)
    schedule = GradualUnfreezing(every_n_epochs=1, lr_decay=0.5)
    given = [schedule, *callbacks, *([] if weighting is None else [weighting])]
    data = StatefulDataLoader(Samples(), batch_size=4)
    val = data if isinstance(weighting, DTP) else None  # it follows a metric of the validation
    fit(module, data, val, ckpt_path=ckpt, max_epochs=EPOCHS, callbacks=given)
    return flat_parameters(module), {} if weighting is None else weighting.state_dict()["state"]


def check(make: Any, path: Path, after: int, **arguments: Any) -> None:
    whole, state = train(make(), Saving(path, after), **arguments)
    resumed, resumed_state = train(make(), ckpt=path, **arguments)
    assert torch.equal(whole, resumed)
    for name, value in state.items():
        assert torch.equal(value, resumed_state[name]) or (value.isnan() == resumed_state[name].isnan()).all(), name


# What remembers numbers of all shared parameters refuses that their number changes.
REMEMBERING = {make for make in METHODS.values() if isinstance(make(), RowMemory)}


@pytest.mark.parametrize("make", one_of_each([m for m in METHODS.values() if m not in REMEMBERING], habits))
def test_every_weighting(make: Any, tmp_path: Path) -> None:
    check(make, tmp_path / "middle.ckpt", after=3)  # in the second epoch: one layer of two is unfrozen


@pytest.mark.parametrize("after", [1, 2, 4, 5])
@pytest.mark.parametrize("make", [lambda: None, functools.partial(MGDA, at="features")], ids=["none", "features"])
def test_at_any_time(make: Any, after: int, tmp_path: Path) -> None:
    scheduler = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=3)
    check(make, tmp_path / "any.ckpt", after, lr_scheduler=scheduler)


def test_another_schedule_is_refused(tmp_path: Path) -> None:
    train(None, Saving(tmp_path / "one.ckpt", 3))
    module = binary(tasks=TASKS, optimizer=ADAM)
    data = StatefulDataLoader(Samples(), batch_size=4)
    with pytest.raises(ValueError, match="resume with the same schedule"):
        fit(module, data, ckpt_path=tmp_path / "one.ckpt", max_epochs=3, callbacks=[GradualUnfreezing({1: "trunk"})])
