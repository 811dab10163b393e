"""One optimizer step stays short to read: few files, and few changes from one to another, seen by a profiler."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import pytest

import lightning_mtl
from lightning_mtl import Weighting
from lightning_mtl.weighting import MGDA
from tests.small import batch, small
from tests.training import fit, loader

ROOT = f"{Path(lightning_mtl.__file__).parent}/"


class Trace(pl.Callback):
    """Notes the package's files in the order in which one steady step calls into them, between its first hook and last.

    The hooks of this callback have to come first, so that what follows belongs to the step.
    """

    def __init__(self, at_batch: int) -> None:
        self.at_batch, self.files = at_batch, list[str]()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.at_batch:
            sys.setprofile(self._note)

    def on_train_batch_end(self, *_: Any) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(ROOT):
            self.files.append(name.removeprefix(ROOT))


@pytest.mark.parametrize(
    ("weighting", "most_files", "most_changes"),
    [pytest.param(None, 8, 20, id="equal weights"), pytest.param(MGDA(), 14, 40, id="MGDA at the trunk")],
)
def test_a_step_crosses_few_files(weighting: Weighting | None, most_files: int, most_changes: int) -> None:
    trace = Trace(at_batch=2)
    fit(small(), loader(*[batch(8)] * 4), callbacks=[trace, *([] if weighting is None else [weighting])], max_epochs=1)
    changes = sum(one != other for one, other in zip(trace.files, trace.files[1:], strict=False))
    assert trace.files
    assert len(set(trace.files)) <= most_files, sorted(set(trace.files))
    assert changes <= most_changes
