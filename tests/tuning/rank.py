"""One of the ranks of a search: ``python -m tests.tuning.rank FOLDER STORAGE RANK``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lightning_mtl.tuning import tune
from tests.tuning.tiny import Fixed

if __name__ == "__main__":
    folder, storage, rank = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    os.environ["RANK"] = rank
    tune(
        folder / "run.yaml",
        folder / "space.yaml",
        trials=6,
        storage=storage,
        folder=folder / "out",
        prune=True,
        sampler=Fixed([1e-1] * 4 + [1e-7, 1e-1]),
    )
