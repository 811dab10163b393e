"""One of the ranks of a search, as torchrun starts it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

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
