"""What monitors add to a step: all of them together, and each by itself, against the same training without.

    python -m benchmarks.monitors              # every 50 and every 200 steps, K = 4, two trunks
    python -m benchmarks.monitors --quick      # few rounds, the MLP alone
    python -m benchmarks.monitors --json PATH

In a fit, steps without monitors take turns with steps that monitors are there for but do not look at, and with steps
that they look at. For one look in n steps the share of the time is

    (there - without) / without + (looking - there) / (n x without)

with the medians of a fit, so that all three are timed within the same second. The median over the fits is printed, with
half of them in brackets. Figures at an epoch's end are drawn once an epoch, whatever its length; their
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from benchmarks.step_cases import Case, Repeated, StepClock, clock
from benchmarks.step_time import environment, keep_freed_memory
from lightning_mtl import Monitor, Weighting
from lightning_mtl.monitors import Convergence, GradientConflict, TaskAffinity, Throughput
from lightning_mtl.monitors.figures import heatmap
from lightning_mtl.weighting import MGDA, UncertaintyWeighting

NUM_TASKS = 4
TARGETS = {50: 0.10, 200: 0.03}
PERIOD = 8  # the monitors look at one step of so many; one of n is reckoned from that
WITHOUT = range(4, 8)  # the steps of a period that are taken without them
CYCLES = 6
WEIGHTINGS: Mapping[str, Callable[[], Weighting]] = {"UncertaintyWeighting": UncertaintyWeighting, "MGDA trunk": MGDA}
MONITORS: Mapping[str, Callable[[], list[Monitor]]] = {
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


class TakesTurns(StepClock):
    """Takes the monitors away for half of each period, and notes when each step begins."""

    def __init__(self, watching: Sequence[Monitor]) -> None:
        super().__init__()
        self.watching = list(watching)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:  # noqa: ANN401
        others = [c for c in trainer.callbacks if c not in self.watching]  # type: ignore[attr-defined]
        without = trainer.global_step % PERIOD in WITHOUT
        trainer.callbacks = others if without else [*others, *self.watching]  # type: ignore[attr-defined]
        super().on_train_batch_start()


@dataclass(frozen=True)
class Times:
    """Seconds of a step without monitors, with monitors that do not look, and with monitors that do."""

    without: float
    there: float
    looking: float

    def share(self, n: int) -> float:
        """What looking at one step of n adds to the time."""
        return (self.there - self.without) / self.without + (self.looking - self.there) / (n * self.without)


def time_round(case: Case, module: pl.LightningModule, weighting: Weighting, watching: list[Monitor]) -> Times:
    clock, steps = TakesTurns(watching), PERIOD * (CYCLES + 1)
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
    trainer.fit(module, Repeated(case.batch, steps + 1))
    taken = [after - before for before, after in itertools.pairwise(clock.begun)][PERIOD:]  # the first ones warm up
    by_place = [taken[place::PERIOD] for place in range(PERIOD)]

    # Not the steps right after a change: what the one before left in the caches and in memory differs.
    def middle(*places: int) -> float:
        return statistics.median(itertools.chain.from_iterable(by_place[place] for place in places))

    return Times(middle(5, 6, 7), middle(1, 2, 3), middle(0))


def measure(case: Case, name: str, rounds: int) -> dict[str, list[Times]]:
    modules = {variant: case.module() for variant in MONITORS}
    times: dict[str, list[Times]] = {variant: [] for variant in MONITORS}
    order, variants = random.Random(0), list(MONITORS)
    for _ in range(rounds):
        order.shuffle(variants)
        for variant in variants:
            times[variant].append(time_round(case, modules[variant], WEIGHTINGS[name](), MONITORS[variant]()))
    return times


def report(case: Case, name: str, times: Mapping[str, Sequence[Times]]) -> list[dict[str, Any]]:
    results = []
    for variant, n in itertools.product(MONITORS, TARGETS):
        shares = [found.share(n) for found in times[variant]]
        low, middle, high = statistics.quantiles(shares, n=4, method="inclusive")
        look = statistics.median((found.looking - found.there) / found.without for found in times[variant])
        target = TARGETS[n] if variant == "all" else None
        verdict = "" if target is None else f"  <= {target:.0%} {'met' if middle <= target else 'MISSED'}"
        label = f"{case.trunk:4} {name:20} {variant:18} every {n:3}"
        print(f"{label:55} {middle:6.1%}  [{low:.1%}, {high:.1%}]  a look: {look:5.2f} steps{verdict}", flush=True)
        row = " ".join(label.split())
        results.append({"row": row, "share": middle, "quartiles": [low, high], "look": look, "target": target})
    return results


def time_figures(log_dir: str) -> list[dict[str, Any]]:
    """Seconds to draw and to log one heatmap."""
    results = []
    logger = TensorBoardLogger(log_dir)
    for num_tasks in (4, 40):
        names = [f"task_{k}" for k in range(num_tasks)]
        taken = []
        for _ in range(4):
            begun = clock("cpu")
            figure = heatmap(torch.rand(num_tasks, num_tasks), names, names, title="cosines")
            logger.experiment.add_figure("heatmap", figure, 0)
            taken.append(clock("cpu") - begun)
        print(f"a heatmap of {num_tasks} tasks, once an epoch: {statistics.median(taken):.2f} s", flush=True)
        results.append({"row": f"heatmap K={num_tasks}", "seconds": statistics.median(taken)})
    logger.experiment.close()  # or its thread would write into a folder that is gone
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
