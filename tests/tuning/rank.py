"""One of the ranks of a search: ``python -m tests.tuning.rank FOLDER STORAGE RANK``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import optuna

from lightning_mtl.tuning import tune

if __name__ == "__main__":
    folder, storage, rank = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    os.environ["RANK"] = rank
    tune(
        folder / "run.yaml",
        folder / "space.yaml",
        trials=7,
        storage=storage,
        folder=folder / "out",
        prune=True,
        sampler=optuna.samplers.RandomSampler(seed=1),
    )
