"""What a solve costs, beside TorchJD where that is installed.

    python -m benchmarks.solvers                       # everything
    python -m benchmarks.solvers --tasks 4 8           # only these K
    python -m benchmarks.solvers --json solvers.json   # the figures as a file, too

Microseconds of processor time per solve, one thread, float64: the median over rounds, in each of which every solver
goes through the same Gramians of independent normal rows, K x 3K. TorchJD (`pip install torchjd[full]`) runs with its
own defaults, which are approximate: its solvers stop early or regularize, ours are exact.
"""
# ruff: noqa: E402 - the number of threads has to be set before NumPy and torch are imported, which read it once.

from __future__ import annotations

import os

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.step_time import environment
from lightning_mtl.solvers import (
    cagrad_weights,
    fairgrad_weights,
    min_norm_weights,
    nash_weights,
    project_on_dual_cone,
    project_rows_on_dual_cone,
)
from lightning_mtl.weighting.gradvac import gradvac_weights
from lightning_mtl.weighting.pcgrad import pcgrad_weights, random_orders

Array = NDArray[np.float64]
Solve = Callable[[], object]
Weigh = Callable[[torch.Tensor], object]

MATRICES = 10
ROUNDS = 15
ON_TENSORS = ("PCGrad", "GradVac")
SECONDS = 3.0  # for one solver and K: the conic solver behind TorchJD's Nash-MTL gets fewer rounds
PACKAGES = ("numpy", "scipy", "torch", "torchjd")


def mean(num_tasks: int) -> Array:
    return np.full(num_tasks, 1 / num_tasks)


SOLVERS: dict[str, Callable[[Any], object]] = {
    "MGDA": min_norm_weights,
    "DualProj": lambda gramian: project_on_dual_cone(gramian, mean(len(gramian))),
    "UPGrad": lambda gramian: project_rows_on_dual_cone(gramian, mean(len(gramian))),
    "CAGrad": lambda gramian: cagrad_weights(gramian, c=0.5),
    "NashMTL": nash_weights,
    "FairGrad": lambda gramian: fairgrad_weights(gramian, alpha=2.0),
}


def ours(num_tasks: int) -> dict[str, Callable[[Any], object]]:
    """Our solvers of a Gramian; PCGrad and GradVac take a tensor, as they are called, and draw their orders anew."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.zeros(num_tasks, num_tasks, dtype=torch.float64)

    def pcgrad(gramian: torch.Tensor) -> object:
        return pcgrad_weights(gramian, random_orders(num_tasks, generator))

    def gradvac(gramian: torch.Tensor) -> object:
        return gradvac_weights(gramian, targets, random_orders(num_tasks, generator))

    return {**SOLVERS, "PCGrad": pcgrad, "GradVac": gradvac}


def torchjd_solvers(num_tasks: int) -> dict[str, Weigh]:
    """TorchJD's weightings of a Gramian; of its Nash-MTL, which takes the rows, the weighting inside."""
    if importlib.util.find_spec("torchjd") is None:
        return {}
    library: Any = importlib.import_module("torchjd.aggregation")
    make: dict[str, Callable[[], Weigh]] = {
        "MGDA": library.MGDAWeighting,
        "DualProj": library.DualProjWeighting,
        "UPGrad": library.UPGradWeighting,
        "CAGrad": lambda: library.CAGradWeighting(c=0.5),
        "NashMTL": lambda: library.NashMTL(n_tasks=num_tasks, max_norm=0.0).weighting,
        "FairGrad": lambda: library.FairGradWeighting(alpha=2.0),
        "PCGrad": library.PCGradWeighting,
        "GradVac": lambda: library.GradVacWeighting(beta=0.01),
    }
    return {method: solver for method, build in make.items() if (solver := _built(method, build)) is not None}


def _built(method: str, build: Callable[[], Weigh]) -> Weigh | None:
    try:
        return build()
    except ImportError as error:  # One of TorchJD's own extras is missing.
        print(f"TorchJD's {method} is left out: {error}")
        return None


def solves(num_tasks: int) -> dict[tuple[str, str], Solve]:
    """What is timed, by method and library: a call goes through all matrices."""
    rng = np.random.default_rng(num_tasks)
    rows = [rng.standard_normal((num_tasks, 3 * num_tasks)) for _ in range(MATRICES)]
    gramians = [matrix @ matrix.T for matrix in rows]

    def through(solve: Callable[[Any], object], inputs: Sequence[Any]) -> Solve:
        return lambda: [solve(value) for value in inputs]

    tensors = [torch.from_numpy(gramian) for gramian in gramians]
    timed = {
        (method, "lightning_mtl"): through(solve, tensors if method in ON_TENSORS else gramians)
        for method, solve in ours(num_tasks).items()
    }
    for method, solve in torchjd_solvers(num_tasks).items():
        inputs = rows if method == "NashMTL" else gramians
        timed[method, "torchjd"] = through(solve, [torch.from_numpy(matrix) for matrix in inputs])
    return timed


def measure(timed: dict[tuple[str, str], Solve]) -> dict[tuple[str, str], float | None]:
    """Median microseconds per solve; None where a solver failed."""
    rounds: dict[tuple[str, str], list[float]] = {key: [] for key in timed}
    failed = set()
    for number in range(ROUNDS + 1):
        for key, solve in timed.items():
            if key in failed or sum(rounds[key]) > SECONDS:
                continue
            start = time.process_time()
            try:
                solve()
            except Exception as error:  # noqa: BLE001 - a foreign solver can raise anything, and the others shall go on.
                print(f"{key[1]} failed on {key[0]}: {error}")
                failed.add(key)
                continue
            duration = time.process_time() - start
            if number > 0 or duration > SECONDS:  # The first round warms up.
                rounds[key].append(duration)
    return {
        key: statistics.median(times) / MATRICES * 1e6 if times and key not in failed else None
        for key, times in rounds.items()
    }


def cell(ours: float | None, theirs: float | None) -> str:
    if ours is None:
        return "failed"
    if theirs is None:
        return f"{ours:.0f}"
    return f"{ours:.0f} / {theirs:.0f} ({theirs / ours:.1f}x)"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Microseconds per solve.")
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 4, 8, 16, 40], metavar="K")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # TorchJD's solvers warn at every call.

    results = {num_tasks: measure(solves(num_tasks)) for num_tasks in options.tasks}
    packages = {name: importlib.metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name)}
    print(f"\nMicroseconds per solve, ours / TorchJD (ratio). {', '.join(map(' '.join, packages.items()))}.\n")
    print("| method | " + " | ".join(f"K = {num_tasks}" for num_tasks in results) + " |")
    print("|---" * (len(results) + 1) + "|")
    for method in (*SOLVERS, *ON_TENSORS):
        cells = [cell(r.get((method, "lightning_mtl")), r.get((method, "torchjd"))) for r in results.values()]
        print(f"| {method} | " + " | ".join(cells) + " |")

    if options.json:
        figures = [
            {"method": method, "library": library, "tasks": num_tasks, "microseconds": microseconds}
            for num_tasks, measured in results.items()
            for (method, library), microseconds in measured.items()
        ]
        report = {**environment(), "packages": packages, "figures": figures}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
