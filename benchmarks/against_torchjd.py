"""A step's time and its peak memory against TorchJD's, the same methods on both sides (`pip install torchjd[full]`).

    python -m benchmarks.against_torchjd --json PATH      # 103 cells; those that the file has are not measured again
    python -m benchmarks.against_torchjd --quick          # an MLP, K = 2 and 8, MGDA and UPGrad
    python -m benchmarks.against_torchjd --full           # every trunk, K, batch and method, many hours
    python -m benchmarks.against_torchjd --only mlp K=8   # the cells whose name holds every word

MGDA is measured on every trunk, K and batch; every other method, which differs from it by the problem it solves, on the
MLP at every K, and with eight tasks on the other trunks; scalarisations on the MLP at every K with the large batch.

Each cell times fits of a few steps, in one process, on one thread, ours and TorchJD's in turn and in another order each
round; ratios are formed within a round. Median, and in brackets where half of the rounds' ratios lie. Times are the
processor time of the process. TorchJD runs as its page on Lightning recommends (``torchjd_modules.py``), without a
logger; ours writes to TensorBoard every 50 steps. "faster" is the fastest of TorchJD's settings in that cell.

To reach: 1.02 of TorchJD's fastest setting, 0.75 of its default; at most (K + 2) P numbers beyond plain training, with
MGDA. Scalarisations: 1.05 of a plain step; FAMO, which computes the losses twice, stands beside TorchJD's alone.
"""

from __future__ import annotations

from benchmarks.step_time import environment, keep_freed_memory, step

# isort: split

import argparse
import functools
import importlib.metadata
import logging
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.step_cases import Case, Device, Precision, Variant
from benchmarks.store import measured
from benchmarks.torchjd_modules import METHODS, SCALARIZATIONS, Autogram, Autojac
from benchmarks.torchjd_results import add, draw
from benchmarks.trunks import PEER_TRUNKS

NUM_TASKS = (2, 4, 8, 16, 40)
BATCHES = (32, 256)
PEERS = ("TorchJD", "TorchJD one by one", "TorchJD engine")
OVER_FASTER, OVER_DEFAULT, OVER_PLAIN = 1.02, 0.75, 1.05
PACKAGES = ("torchjd", "cvxpy", "quadprog", "qpsolvers", "scipy", "numpy")


@dataclass(frozen=True)
class Cell:
    trunk: str
    num_tasks: int
    batch: int
    method: str

    @property
    def name(self) -> str:
        return f"{self.trunk:11} K={self.num_tasks:<2} B={self.batch:<3} {self.method:10}"


def full() -> list[Cell]:
    names = [*METHODS, *SCALARIZATIONS]
    return [Cell(t, k, b, name) for t in PEER_TRUNKS for k in NUM_TASKS for b in BATCHES for name in names]


def chosen() -> list[Cell]:
    """MGDA everywhere; every other method on the MLP, and with eight tasks elsewhere. The longest steps come last."""
    grid = [Cell(t, k, b, "MGDA") for b in BATCHES for k in NUM_TASKS for t in PEER_TRUNKS]
    each = [Cell("mlp", k, 32, name) for k in NUM_TASKS for name in list(METHODS)[1:]]
    elsewhere = [Cell(t, 8, 32, name) for t in PEER_TRUNKS if t != "mlp" for name in (*list(METHODS)[1:], "UW", "FAMO")]
    sums = [Cell("mlp", k, 256, name) for k in NUM_TASKS for name in SCALARIZATIONS]
    return [*grid[:15], *sums, *each, *elsewhere, *grid[15:]]


def quick() -> list[Cell]:
    return [Cell("mlp", k, 32, name) for k in (2, 8) for name in ("MGDA", "UPGrad", "UW")]


def variants(cell: Cell) -> list[Variant]:
    """Plain training, ours, and each way in which TorchJD can run the method."""
    plain = Variant("plain", plain=True)
    if cell.method in SCALARIZATIONS:
        scalarization = SCALARIZATIONS[cell.method]
        return [
            plain,
            Variant("ours", scalarization.ours),
            Variant(PEERS[0], make=scalarization.theirs, logger=False),
        ]
    method, k = METHODS[cell.method], cell.num_tasks
    found = [plain, Variant("ours", method.ours)]
    for name, chunk in zip(PEERS, (None, 1), strict=False):
        make = functools.partial(Autojac, aggregator=method.aggregator(k), chunk=chunk)
        found.append(Variant(name, make=make, logger=False))
    # BatchNorm mixes samples and writes its statistics, which the engine's documentation advises against.
    if method.weighting is not None and cell.trunk != "resnet":
        found.append(Variant(PEERS[2], make=functools.partial(Autogram, weighting=method.weighting()), logger=False))
    return found


def measure(
    cell: Cell, rounds: int, log_dir: str, device: Device = "cpu", precision: Precision = "32-true"
) -> dict[str, Any]:
    steps = 8 if cell.num_tasks <= 8 else 4
    case = Case(cell.trunk, cell.num_tasks, steps, log_dir, PEER_TRUNKS, cell.batch, device, precision)
    todo = variants(cell)
    order = random.Random(0)
    for _ in range(rounds):
        for variant in order.sample(todo, len(todo)):
            case.time_round(variant)
    seconds = {name: [step(times) for times in found] for name, found in case.times.items()}
    peers = [name for name in PEERS if name in seconds]
    faster = min(peers, key=lambda name: statistics.median(seconds[name]))
    result: dict[str, Any] = {
        "cell": " ".join(cell.name.split()),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rounds": rounds,
        "load_average": list(os.getloadavg()),
        "step_ms": {name: statistics.median(found) * 1e3 for name, found in seconds.items()},
        "faster": faster,
        "ours_over_faster": ratio(seconds["ours"], seconds[faster]),
        "ours_over_default": ratio(seconds["ours"], seconds[PEERS[0]]),
        "ours_over_plain": ratio(seconds["ours"], seconds["plain"]),
    }
    result["met"] = verdicts(cell, result)
    if cell.method == "MGDA":
        result["numbers_per_parameter"] = extra_memory(case, todo)
        result["met"]["memory"] = result["numbers_per_parameter"]["ours"] <= cell.num_tasks + 2
    return result


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    found = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return {"median": middle, "quartiles": [low, high]}


def verdicts(cell: Cell, result: dict[str, Any]) -> dict[str, bool]:
    if cell.method == "FAMO":
        return {}
    if cell.method in SCALARIZATIONS:
        return {"plain": result["ours_over_plain"]["median"] <= OVER_PLAIN}
    return {
        "faster": result["ours_over_faster"]["median"] <= OVER_FASTER,
        "default": result["ours_over_default"]["median"] <= OVER_DEFAULT,
    }


def extra_memory(case: Case, todo: Sequence[Variant]) -> dict[str, float]:
    """The most numbers that are held beyond plain training's peak, as a multiple of P."""
    peaks = {v.name: case.peak(case.made(v), None if v.weighting is None else v.weighting()) for v in todo}
    num_parameters = sum(parameter.numel() for parameter in case.parts()[0].parameters())
    return {name: (peak - peaks["plain"]) / 4 / num_parameters for name, peak in peaks.items() if name != "plain"}


def show(cell: Cell, result: dict[str, Any]) -> None:
    times = "  ".join(f"{name} {ms:.2f}" for name, ms in result["step_ms"].items())
    print(f"{cell.name} ms: {times}")
    targets = {"faster": OVER_FASTER, "default": OVER_DEFAULT, "plain": OVER_PLAIN}
    words = []
    for over, target in targets.items():
        found = result[f"ours_over_{over}"]
        low, high = found["quartiles"]
        words.append(f"/ {over} {found['median']:.2f} [{low:.2f}, {high:.2f}]{judged(result, over, f'{target:.2f}')}")
    print(f"{'':31} ours " + "   ".join(words), flush=True)
    if memory := result.get("numbers_per_parameter"):
        numbers = "  ".join(f"{name} {found:.2f} P" for name, found in memory.items())
        print(
            f"{'':31} memory beyond plain: {numbers}{judged(result, 'memory', f'{cell.num_tasks + 2} P')}", flush=True
        )


def judged(result: dict[str, Any], what: str, target: str) -> str:
    if what not in result["met"]:
        return ""
    return f" <= {target} {'met' if result['met'][what] else 'MISSED'}"


def summary(results: Sequence[dict[str, Any]]) -> None:
    for what in ("faster", "default", "memory", "plain"):
        judged_here = [result["met"][what] for result in results if what in result["met"]]
        if judged_here:
            print(f"{what:8} met in {sum(judged_here)} of {len(judged_here)} cells")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a few cells of an MLP, few rounds")
    size.add_argument("--full", action="store_true", help="every trunk, K, batch and method")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cells whose name holds every word")
    parser.add_argument("--rounds", type=int, help="how often the variants take turns; 5, or 3 with --quick")
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="add the figures there after each cell, and leave out what it has"
    )
    parser.add_argument("--again", action="store_true", help="measure what --json has, too: after a change of the code")
    parser.add_argument("--minutes", type=float, default=40.0, help="begin no cell after; default: 40")
    parser.add_argument("--png", type=Path, metavar="PATH", help="draw what --json holds by then")
    options = parser.parse_args(arguments)
    rounds = options.rounds or (3 if options.quick else 5)
    if rounds < 2:
        parser.error("--rounds must be at least 2, for a spread.")
    torch.set_num_threads(1)
    keep_freed_memory()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    about = environment()
    about["versions"].update({name: importlib.metadata.version(name) for name in PACKAGES})
    about["seed"] = 0
    print(", ".join(f"{name} {value}" for name, value in {**about["machine"], **about["versions"]}.items()))
    cells = full() if options.full else quick() if options.quick else chosen()
    results = measured(options.json, about)
    known = set() if options.again else {result["cell"] for result in results}
    wanted = [cell for cell in cells if all(word in cell.name.split() for word in options.only)]
    todo = [cell for cell in wanted if " ".join(cell.name.split()) not in known]
    if len(todo) < len(wanted):
        print(f"{len(wanted) - len(todo)} of {len(wanted)} cells are known from {options.json}; --again measures them.")
    until = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as log_dir:
        for number, cell in enumerate(todo):
            if time.monotonic() > until:
                print(f"The time is over, {len(todo) - number} cells are left; the next start goes on from here.")
                break
            results.append(measure(cell, rounds, log_dir))
            show(cell, results[-1])
            if options.json:  # a long run that is cut short keeps what it has
                results = add(options.json, about, results)
    summary(results)
    if options.png:
        versions = f"torch {about['versions']['torch']}, TorchJD {about['versions']['torchjd']}"
        title = f"{about['machine']['processor']}, {versions}, one thread, {about['date'][:10]}"
        draw(results, title).savefig(options.png, dpi=110)


if __name__ == "__main__":
    main()
