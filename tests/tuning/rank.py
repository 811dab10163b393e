"""One of the ranks of a search, as torchrun starts it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy

from lightning_mtl.tuning import tune
from tests.tuning.tiny import Fixed


def search(
    folder: Path, storage: str, torchrun: Mapping[str, str], trials: int, prune: bool, rank: int, ranks: int
) -> None:
    os.environ.update(torchrun, RANK=str(rank))
    tune(
        folder / "run.yaml",
        folder / "space.yaml",
        trials=trials,
        storage=storage,
        folder=folder / "out",
        prune=prune,
        sampler=Fixed([1e-1] * 4 + [1e-7, 1e-1]),
    )


def search_with_a_fault(folder: Path, storage: str, torchrun: Mapping[str, str], rank: int, ranks: int) -> None:
    """Only rank 0 asks the pruner, and in the first trial it fails."""

    def should_prune(trial: Any) -> bool:
        if trial.number == 0:
            raise sqlalchemy.exc.DataError("SELECT 1", None, Exception("out of range"))
        return False

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(optuna.Trial, "should_prune", should_prune)
        search(folder, storage, torchrun, 2, True, rank, ranks)
