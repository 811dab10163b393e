"""A checkpoint written inside an optimizer step lacks its gradients: who writes one and who resumes is warned."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from lightning_mtl import Weighting
from lightning_mtl.weighting import MGDA
from tests.small import batches, small
from tests.training import fit, loader


class Saving(pl.Callback):
    def __init__(self, after: int, path: Path) -> None:
        self.after, self.path = after, path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.after:
            trainer.save_checkpoint(self.path)
            trainer.save_checkpoint(self.path)


def messages(after: int, weighting: Weighting | None, path: Path, ckpt: Path | None = None) -> list[str]:
    callbacks: list[pl.Callback] = [Saving(after, path), *([] if weighting is None else [weighting])]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = small(accumulate_grad_batches=3)
        fit(module, loader(*batches(2, 2, 2, 2, 2, 2)), callbacks=callbacks, max_epochs=2, ckpt_path=ckpt)
    return [str(warning.message) for warning in caught if "inside optimizer step" in str(warning.message)]


@pytest.mark.parametrize("weighting", [None, MGDA], ids=["equal weights", "MGDA"])
@pytest.mark.parametrize("after", [4, 5])
def test_inside_a_step_is_said_once_where_it_is_written_and_where_it_is_resumed(
    after: int, weighting: Any, tmp_path: Path
) -> None:
    path = tmp_path / "run.ckpt"
    make = weighting or (lambda: None)
    (written,) = messages(after, make(), path)
    assert f"inside optimizer step 1, after {after - 3} of its 3 micro-batches" in written
    (resumed,) = messages(-1, make(), path, path)
    assert f"inside optimizer step 1: the gradients of its first {after - 3} micro-batches are lost" in resumed


@pytest.mark.parametrize("after", [3, 6, 9])
def test_between_steps_nothing_is_said(after: int, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    assert messages(after, None, path) == []
    assert messages(-1, None, path, path) == []
