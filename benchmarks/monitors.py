"""What monitors add to a step: all of them together, and each by itself, against the same training without.

    python -m benchmarks.monitors              # every 50 and every 200 steps, K = 4, two trunks
    python -m benchmarks.monitors --quick      # few rounds, the MLP alone
    python -m benchmarks.monitors --json PATH

A round times, in turn and in another order each time, steps that no monitor looks at and steps that all look at, with
each weighting. The share is formed within the round: (measured - ordinary) / (n x unwatched step) for one step of n,
plus what a step between measurements costs more than one without monitors. The median over the rounds is printed, with
half of the rounds' shares in brackets. Figures at an epoch's end are drawn once an epoch, whatever its length; their
time is printed by itself. Times are the processor time of the process.
"""

# ruff: noqa: E402 - the number of threads has to be set before NumPy and torch are imported, which read it once.

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import argparse
import itertools
import json
import logging
import random
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from benchmarks.step_cases import CLOCK, Case, Repeated, StepClock
from benchmarks.step_time import environment, keep_freed_memory
from lightning_mtl import Monitor, MultiTaskModule, Weighting
from lightning_mtl.figures import heatmap
from lightning_mtl.monitors import Convergence, GradientConflict, TaskAffinity, Throughput
from lightning_mtl.weighting import MGDA, UncertaintyWeighting

NUM_TASKS = 4
TARGETS = {50: 0.10, 200: 0.03}
PERIOD = 4  # in the timed fits one step of so many is measured; one of n is reckoned from that
CYCLES = 6
WEIGHTINGS: Mapping[str, Callable[[], Weighting]] = {"UncertaintyWeighting": UncertaintyWeighting, "MGDA trunk": MGDA}
MONITORS: Mapping[str, Callable[[], list[Monitor]]] = {
    "none": list,
    "GradientConflict": lambda: [GradientConflict(PERIOD, figure=False)],
    "TaskAffinity": lambda: [TaskAffinity(PERIOD, figure=False)],
    "TaskAffinity exact": lambda: [TaskAffinity(PERIOD, exact=True, figure=False)],
    "Convergence": lambda: [Convergence(PERIOD)],
    "Throughput": lambda: [Throughput(PERIOD)],
    "all": lambda: [
        GradientConflict(PERIOD, figure=False),
        TaskAffinity(PERIOD, figure=False),
        Convergence(PERIOD),
        Throughput(PERIOD),
    ],
}


def time_round(
    case: Case, module: MultiTaskModule, weighting: Weighting, watching: list[Monitor]
) -> tuple[float, float]:
    """Seconds of an ordinary step, and of one that is measured."""
    clock = StepClock()
    steps = PERIOD * CYCLES
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=TensorBoardLogger(case.log_dir),
        log_every_n_steps=10**6,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock, weighting, *watching],
    )
    trainer.fit(module, Repeated(case.batch, steps + 2))
    taken = [after - before for before, after in itertools.pairwise(clock.begun)]
    # The first cycle warms up; a step runs from its beginning to the next one's, where measured steps end, too.
    measured = [seconds for step, seconds in enumerate(taken) if step >= PERIOD and step % PERIOD == 0]
    ordinary = [seconds for step, seconds in enumerate(taken) if step >= PERIOD and step % PERIOD]
    return statistics.median(ordinary), statistics.median(measured)


def measure(case: Case, name: str, rounds: int) -> dict[str, list[tuple[float, float]]]:
    modules = {}
    for variant in MONITORS:
        modules[variant] = case.module()
    order, times = random.Random(0), {variant: [] for variant in MONITORS}  # type: dict[str, list[tuple[float, float]]]
    variants = list(MONITORS)
    for _ in range(rounds):
        order.shuffle(variants)
        for variant in variants:
            module = modules[variant]
            assert isinstance(module, MultiTaskModule)  # noqa: S101 - for mypy
            times[variant].append(time_round(case, module, WEIGHTINGS[name](), MONITORS[variant]()))
    return times


def report(case: Case, name: str, times: Mapping[str, Sequence[tuple[float, float]]]) -> list[dict[str, Any]]:
    results = []
    for variant, n in itertools.product((v for v in MONITORS if v != "none"), TARGETS):
        shares = [
            (ordinary - unwatched) / unwatched + (measured - ordinary) / (n * unwatched)
            for (ordinary, measured), (unwatched, _) in zip(times[variant], times["none"], strict=True)
        ]
        low, middle, high = statistics.quantiles(shares, n=4, method="inclusive")
        once = statistics.median((m - o) / u for (o, m), (u, _) in zip(times[variant], times["none"], strict=True))
        target = TARGETS[n] if variant == "all" else None
        verdict = "" if target is None else f"  <= {target:.0%} {'met' if middle <= target else 'MISSED'}"
        label = f"{case.trunk:4} {name:20} {variant:18} every {n:3}"
        print(
            f"{label:55} {middle:7.1%}  [{low:.1%}, {high:.1%}]  a measured step: + {once:5.2f} steps{verdict}",
            flush=True,
        )
        results.append(
            {"row": " ".join(label.split()), "share": middle, "quartiles": [low, high], "once": once, "target": target}
        )
    return results


def time_figures(log_dir: str) -> list[dict[str, Any]]:
    """Seconds to draw and to log one heatmap."""
    results = []
    logger = TensorBoardLogger(log_dir)
    for num_tasks in (4, 40):
        names = [f"task_{k}" for k in range(num_tasks)]
        taken = []
        for _ in range(4):
            begun = CLOCK()
            figure = heatmap(torch.rand(num_tasks, num_tasks), names, names, title="cosines")
            logger.experiment.add_figure("heatmap", figure, 0)
            taken.append(CLOCK() - begun)
        print(f"a heatmap of {num_tasks} tasks, once an epoch: {statistics.median(taken):.2f} s", flush=True)
        results.append({"row": f"heatmap K={num_tasks}", "seconds": statistics.median(taken)})
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, the MLP alone")
    parser.add_argument("--rounds", type=int, help="how often the variants take turns; 9, or 3 with --quick")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there, too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    about, results = environment(), []
    print(", ".join(f"{name} {value}" for name, value in {**about["machine"], **about["versions"]}.items()))
    with tempfile.TemporaryDirectory() as log_dir:
        for trunk, name in itertools.product(("mlp",) if options.quick else ("mlp", "conv"), WEIGHTINGS):
            case = Case(trunk, NUM_TASKS, PERIOD * CYCLES, log_dir)
            results += report(case, name, measure(case, name, options.rounds or (3 if options.quick else 9)))
        results += time_figures(log_dir)
    if options.json:
        options.json.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
