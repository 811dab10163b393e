"""What a step costs with each way of weighting, against plain training in the same process.

    python -m benchmarks.step_time                     # everything
    python -m benchmarks.step_time --quick             # few rounds, K = 2 and 8
    python -m benchmarks.step_time --only conv trunk   # rows whose name holds every word

Each figure comes from steps inside ``Trainer.fit``, with TensorBoard, one batch repeated, on one thread. Variants take
turns in short rounds, and a ratio is formed within each round: a machine that other work slows down disturbs both sides
of it alike. The median is printed; half of the rounds' ratios lie in the brackets; the last ratio is that of the
fastest rounds. Times are the processor time of the process, which what else runs disturbs less than the clock on the
wall; on one thread of an idle machine the two agree.
"""

# ruff: noqa: E402 - the number of threads has to be set before NumPy and torch are imported, which read it once.

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import argparse
import ctypes
import json
import logging
import platform
import random
import statistics
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning
import torch

from benchmarks.physics_steps import PhysicsCase
from benchmarks.step_cases import TRUNKS, VARIANTS, Case, Times
from lightning_mtl import __version__

NUM_TASKS = (2, 4, 8, 40)
LOG_EVERY = 50  # Lightning's default: one step in 50 pays for writing the scalars


@dataclass(frozen=True)
class Row:
    """One line of the table: a variant's step over ``plain + count x extra``, or over another variant's."""

    variant: str
    over: str = "plain"
    target: float | None = None
    extra: str | None = None
    count: int = 0


def rows(trunk: str, num_tasks: int) -> list[Row]:
    return [
        Row("equal weights", target=1.05),
        Row("UncertaintyWeighting", target=1.05),
        Row("DWA", target=1.05),
        Row("MGDA features", target=1.15 if num_tasks <= 8 else 1.6),
        Row("GradNorm last_layer", target=1.10, extra="layer gradient", count=num_tasks),
        Row("MGDA trunk", target=TRUNKS[trunk].to_reach, extra="trunk backward", count=num_tasks - 1),
        Row("UncertaintyWeighting", over="no logger", target=1.05 if num_tasks == 40 else None),
        Row("task metrics", over="UncertaintyWeighting"),
    ]


def physics_rows() -> list[Row]:
    """Three losses of one network, one of them of its second derivatives: each is passed backward once either way."""
    return [Row("equal weights"), Row("UncertaintyWeighting"), Row("MGDA trunk")]


def label(case: Case, row: Row) -> str:
    over = row.over + (f" + {row.count} {row.extra}" if row.extra else "")
    return f"{case.trunk:4} K={case.num_tasks:<2} {row.variant} / {over}"


def step(times: Times) -> float:
    """The mean step of a run that writes scalars every ``LOG_EVERY`` steps."""
    return times.ordinary + (times.logged - times.ordinary) / LOG_EVERY


def evaluate(case: Case, row: Row) -> dict[str, Any]:
    """Form the ratios within each round, and take their median and quartiles."""
    extra = case.times[row.extra] if row.extra else case.times[row.over]
    base = [step(a) + row.count * b.ordinary for a, b in zip(case.times[row.over], extra, strict=True)]
    taken = [step(times) for times in case.times[row.variant]]
    ratios = [a / b for a, b in zip(taken, base, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "row": " ".join(label(case, row).split()),
        "trunk": case.trunk,
        "num_tasks": case.num_tasks,
        "ratio": middle,
        "quartiles": [low, high],
        "ratio_of_fastest_rounds": min(taken) / min(base),
        "target": row.target,
        "step_ms": statistics.median(taken) * 1e3,
        "over_ms": statistics.median(base) * 1e3,
    }


def show(case: Case, row: Row, result: dict[str, Any]) -> None:
    low, high = result["quartiles"]
    verdict = "met" if row.target is None or result["ratio"] <= row.target else "MISSED"
    target = "" if row.target is None else f"  <= {row.target:.2f} {verdict}"
    print(
        f"{label(case, row):66} {result['step_ms']:8.2f} ms {result['ratio']:7.3f}  [{low:.3f}, {high:.3f}] "
        f"{result['ratio_of_fastest_rounds']:8.3f}{target}",
        flush=True,
    )


def environment() -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "lightning_mtl": __version__,
        },
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory_row(case: Case, words: Sequence[str]) -> dict[str, Any] | None:
    name = f"{case.trunk:4} K={case.num_tasks:<2} memory of MGDA trunk beyond plain"
    if not all(word in name for word in words):
        return None
    extra, bound = case.extra_numbers_per_parameter(), case.num_tasks + 2
    print(f"{name:66} {extra:8.2f} P  <= {bound} P {'met' if extra <= bound else 'MISSED'}", flush=True)
    return {"row": " ".join(name.split()), "numbers_per_parameter": extra, "target": bound}


def run(case: Case, wanted: Sequence[Row], rounds: int) -> None:
    """Let everything that the rows need take turns, in another order each round."""
    passes = any(row.extra for row in wanted)
    variants = [VARIANTS[name] for name in VARIANTS if any(name in (row.variant, row.over) for row in wanted)]
    order = random.Random(0)
    for _ in range(rounds):
        order.shuffle(variants)
        for variant in variants:
            case.time_round(variant)
        if passes:
            case.time_passes()


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, for both sides of every ratio.

    Left alone it hands some of it back and faults it in again, thousands of pages in a step or none, as the history of
    the process has it: differences of 5 % that no variant is the cause of.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold, gigabyte = -1, -3, 2**30
        mallopt(trim_threshold, gigabyte)
        mallopt(mmap_threshold, gigabyte)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, K = 2 and 8")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows whose name holds every word")
    parser.add_argument("--rounds", type=int, help="how often the variants take turns; 9, or 3 with --quick")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there, too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    about, results = environment(), []
    print(", ".join(f"{name} {value}" for name, value in {**about["machine"], **about["versions"]}.items()))
    print(f"{'variant / what it is compared with':66}   step, ms   ratio  half the rounds  fastest  to reach")
    with tempfile.TemporaryDirectory() as log_dir:
        for trunk in TRUNKS:
            for num_tasks in (2, 8) if options.quick else NUM_TASKS:
                case = Case(trunk, num_tasks, 5 if num_tasks == 40 else 10, log_dir)
                named = {label(case, row): row for row in rows(trunk, num_tasks)}
                wanted = [row for name, row in named.items() if all(word in name for word in options.only)]
                run(case, wanted, options.rounds or (3 if options.quick else 9))
                for row in wanted:
                    results.append(evaluate(case, row))
                    show(case, row, results[-1])
                if memory := memory_row(case, options.only):
                    results.append(memory)
        for points in (64, 256, 2048):
            pinn = PhysicsCase(f"pinn of {points} points", 3, 10, log_dir, batch_size=points)
            named = {label(pinn, row): row for row in physics_rows()}
            wanted = [row for name, row in named.items() if all(word in name for word in options.only)]
            run(pinn, wanted, options.rounds or (3 if options.quick else 9))
            for row in wanted:
                results.append(evaluate(pinn, row))
                show(pinn, row, results[-1])
    if options.json:
        options.json.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
