"""SIGTERM leaves a checkpoint to resume from; a broken file is named."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import TensorDataset

from lightning_mtl import MultiTaskModule
from lightning_mtl.data import MultiTaskDataModule
from lightning_mtl.weighting import GradNorm
from tests.small import batch, binary
from tests.training import flat_parameters, quiet_trainer

pytestmark = [
    # Of resuming in another folder, without the callback that stopped the run.
    pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning"),
]

TASKS = ("a", "b")


class Terminated(pl.Callback):
    """What a cluster does to a job whose time is over."""

    def __init__(self, batch: int, hook: str) -> None:
        self.batch, self.hook = batch, hook

    def _terminate(self, trainer: pl.Trainer, hook: str) -> None:
        if hook == self.hook and trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        self._terminate(trainer, "on_before_optimizer_step")

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._terminate(trainer, "on_validation_batch_start")


def train(folder: Path, *callbacks: pl.Callback, ckpt: Path | None = None) -> MultiTaskModule:
    module = binary(tasks=TASKS, optimizer=functools.partial(torch.optim.Adam, lr=0.05))
    inputs, targets = batch(16, 11, TASKS)
    data = {task: TensorDataset(inputs, target) for task, target in targets.items()}
    saving = ModelCheckpoint(folder, save_on_exception=True)
    trainer = quiet_trainer(
        max_epochs=3, callbacks=[GradNorm(lr=0.1), saving, *callbacks], enable_checkpointing=True, val_check_interval=2
    )
    trainer.fit(module, datamodule=MultiTaskDataModule(data, data, batch_size=4), ckpt_path=ckpt)
    return module


@pytest.mark.parametrize("hook", ["on_before_optimizer_step", "on_validation_batch_start"])
@pytest.mark.parametrize("number", [3, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 5, 7))])
def test_sigterm_leaves_a_checkpoint(number: int, hook: str, tmp_path: Path) -> None:
    with pytest.raises(SIGTERMException):
        train(tmp_path / "stopped", Terminated(number, hook))
    last = max((tmp_path / "stopped").glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    whole, resumed = train(tmp_path / "whole"), train(tmp_path / "resumed", ckpt=last)
    assert torch.equal(flat_parameters(resumed), flat_parameters(whole))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_named(share: float, tmp_path: Path) -> None:
    train(tmp_path / "whole")
    (path,) = (tmp_path / "whole").glob("*.ckpt")
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with (
        pytest.warns(UserWarning, match=f"The checkpoint {path} is cut off"),
        pytest.raises((RuntimeError, EOFError, OSError)),
    ):
        train(tmp_path / "resumed", ckpt=path)
