"""What unlike units of the losses do to each way of weighing, and how many random weights are worth a method.

One loss of each data set, a regression's, is multiplied by 0.001, 1 and 1,000, as another unit would. All rows have
Adam, three of them SGD, too. Each row chooses its learning rate at each scale, by validation data of a seed of its own,
and trains with five others. A factor before the loss is not in standardized targets, and tuned fixed weights are
divided by it: these two rows train once, and their lines are flat.

The budget: the best of n = 1, 4, 16, 64 sets of random fixed weights, each with the same choice of learning rates,
against methods that nobody tuned but for their rate. Weights are drawn uniformly from the simplex and over six decades.

    python -m benchmarks.units --data quickstart                     # or helmholtz; qm9 with the package qm9pack
    python -m benchmarks.units --data rf1 school --data-dir FOLDER

Each training is written to the JSON file as it ends, and a second start goes on from there.
"""

from __future__ import annotations

import argparse
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.store import Store
from benchmarks.units_data import molecules, rivers, schools
from benchmarks.units_more_problems import School, Waves
from benchmarks.units_outcome import Outcome, Result, show
from benchmarks.units_picture import draw
from benchmarks.units_problems import Optimizer, Problem, Quickstart, Setting, Tabular
from benchmarks.units_rows import (
    DECADES,
    ROWS,
    SIMPLEX,
    TUNED,
    TUNING_SEED,
    Row,
    choose,
    drawn,
)
from lightning_mtl.training.update import NotFiniteError
from lightning_mtl.tuning.comparing.plan import Candidate, Training
from lightning_mtl.weighting import StaticWeights
from program import quieten

SCALES = (1e-3, 1.0, 1e3)
DRAWS = (1, 4, 16, 64)
SEEDS = 5
PROBLEMS: dict[str, Callable[[Path | None], Problem[Any]]] = {
    "quickstart": lambda _: Quickstart(),
    "rf1": lambda folder: Tabular(rivers(folder), "DLDI4"),
    "school": lambda folder: School(schools(folder)),
    "qm9": lambda folder: Tabular(molecules(folder), "U0"),
    "helmholtz": lambda _: Waves(),
}


@dataclass(frozen=True)
class Cell:
    """One training."""

    row: str
    optimizer: Optimizer
    scale: float
    variant: int  # of random weights, the number of the set
    lr: float
    seed: int
    steps: int


class Runner:
    """Trains what is not done yet.

    Args:
        problem: The data.
        store: What is done.
        until: The time of the clock after which no training begins.
    """

    def __init__(self, problem: Problem[Any], store: Store, until: float) -> None:
        self.problem, self.store, self.until = problem, store, until
        self.done = {self.key(one): one for one in store.results}

    @staticmethod
    def key(result: dict[str, Any]) -> tuple[object, ...]:
        """A cell's fields, as the file has them."""
        return tuple(result[name] for name in Cell.__dataclass_fields__)

    def result(self, cell: Cell) -> dict[str, Any]:
        """What a training has come to.

        Raises:
            TimeoutError: If it is not done, and there is no time left.
        """
        key = self.key(asdict(cell))
        if key not in self.done:
            if time.monotonic() > self.until:
                raise TimeoutError
            self.done[key] = asdict(cell) | train(self.problem, cell)
            self.store.add(self.done[key])
            val, test = self.done[key]["val"], self.done[key]["test"]
            print(
                f"{len(self.done):5} {cell.row:28} {cell.optimizer:4} x {cell.scale:<6g} lr {cell.lr:<8g} "
                f"set {cell.variant:<2} seed {cell.seed:<3} val {val or math.inf:8.2f} test {test or math.inf:8.2f}",
                flush=True,
            )
        return self.done[key]

    def choice(self, row: str, optimizer: Optimizer, scale: float, variants: int = 1) -> tuple[Candidate, float]:
        """Choose a row's learning rate, and set of weights; the choice's error."""

        def error(training: Training) -> float:
            candidate = training.candidate
            found = self.result(self.cell(row, optimizer, scale, candidate, TUNING_SEED))["val"]
            return math.inf if found is None else float(found)

        return choose(row, self.problem.rates[optimizer], variants, error)

    def cell(self, row: str, optimizer: Optimizer, scale: float, candidate: Candidate, seed: int) -> Cell:
        """Name a training."""
        return Cell(row, optimizer, scale, candidate.variant, candidate.rate, seed, self.problem.steps)


def train(problem: Problem[Any], cell: Cell) -> dict[str, Any]:
    """Run a cell: its errors in percent, None where it diverged, and its processor time."""
    began = time.process_time()
    warnings.filterwarnings("ignore", r"In the first step the loss of task")  # what this is about
    warnings.filterwarnings("ignore", r".* times the median weight of the others")
    warnings.filterwarnings("ignore", r"Step \d+ is skipped")
    random = {SIMPLEX, DECADES} & {cell.row}
    row = next((one for one in ROWS if one.name == cell.row), Row(cell.row))
    setting = Setting(cell.lr, cell.optimizer, cell.scale, row.divided, row.standardized)
    torch.manual_seed(cell.seed)
    module = problem.module(setting, cell.seed)
    weighting = row.make(problem)
    if random:
        weighting = StaticWeights(drawn(cell.row, problem, cell.variant + 1)[-1])
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[] if weighting is None else [weighting],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    errors: dict[str, float | None] = dict.fromkeys(("val", "test", "scaled"))
    try:
        trainer.fit(module, problem.batches(cell.seed))
    except NotFiniteError:
        pass
    else:
        module.eval()
        with torch.no_grad():
            found = asdict(problem.errors(module, cell.seed))
        errors = {name: float(f"{value:.5g}") if math.isfinite(value) else None for name, value in found.items()}
    return {**errors, "seconds": round(time.process_time() - began, 3)}


def chosen_rows(runner: Runner, rows: Sequence[tuple[Row, Optimizer]]) -> list[Cell]:
    """Choose each row's learning rate at each scale; its training, without a seed."""
    found = []
    for row, optimizer in rows:
        if row.standardized and not runner.problem.standardizes:
            continue
        for scale in (1.0,) if row.standardized else SCALES:
            choice, _ = runner.choice(row.name, optimizer, scale)
            found.append(runner.cell(row.name, optimizer, scale, choice, TUNING_SEED))
    return found


def search_weights(runner: Runner, seeds: range, outcome: Outcome) -> None:
    """Train the best of n random sets of fixed weights at scale 1, n by n; the better kind's are the tuned ones."""
    for n in DRAWS:
        chosen = {kind: runner.choice(kind, "Adam", 1.0, n) for kind in (SIMPLEX, DECADES)}
        cells = {kind: runner.cell(kind, "Adam", 1.0, one, TUNING_SEED) for kind, (one, _) in chosen.items()}
        trained: dict[str, list[Result]] = {
            kind: [runner.result(replace(cell, seed=seed)) for seed in seeds] for kind, cell in cells.items()
        }
        outcome.draws |= {(kind, n): results for kind, results in trained.items()}
        outcome.tuned = trained[min(chosen, key=lambda kind: chosen[kind][1])]


def run(runner: Runner, rows: Sequence[tuple[Row, Optimizer]], seeds: range, *, draws: bool) -> Outcome:
    """Train all: choices first, then seed by seed, so that what was interrupted has whole tables of fewer seeds."""
    outcome = Outcome(runner.problem, SCALES, results=runner.store.results)
    try:
        chosen = chosen_rows(runner, rows)
        for seed in seeds:
            outcome.curves += [runner.result(replace(cell, seed=seed)) for cell in chosen]
        if draws:
            search_weights(runner, seeds, outcome)
    except TimeoutError:
        print("The time is over; the next start goes on from here.")
    return outcome


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = os.environ.get("LIGHTNING_MTL_DATA")
    parser.add_argument("--data", nargs="+", default=["quickstart"], choices=list(PROBLEMS), help="default: quickstart")
    parser.add_argument("--data-dir", type=Path, default=Path(folder) if folder else None, help="for rf1 and school")
    parser.add_argument(
        "--only", nargs="+", default=[""], metavar="WORD", help="rows that hold one of them, as 'MGDA, Adam'"
    )
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"default: {SEEDS}")
    parser.add_argument("--steps", type=int, help="of a training; default: what the data have")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="begin no training of a data set after; default: 60"
    )
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), metavar="FOLDER")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or (options.steps is not None and options.steps < 2):
        parser.error("--seeds must be at least 1 and --steps at least 2")
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Outcome]:
    options = parse(arguments)
    quieten()
    torch.set_num_threads(1)
    rows = [
        (row, optimizer)
        for row in ROWS
        for optimizer in row.optimizers
        if any(word in f"{row.name}, {optimizer}" for word in options.only)
    ]
    draws = any(word in TUNED for word in options.only)
    outcomes = {}
    for name in options.data:
        try:
            problem = PROBLEMS[name](options.data_dir)
        except (OSError, ValueError) as error:
            raise SystemExit(f"units.py: {error}") from error
        problem.steps = options.steps or problem.steps
        about = {"data": name, "error": problem.error, "scaled": problem.scaled, "tasks": len(problem.tasks)}
        store = Store(options.results / f"units_{name}.json", about)
        runner = Runner(problem, store, time.monotonic() + 60 * options.minutes)
        outcomes[name] = run(runner, rows, range(options.seeds), draws=draws)
        show(outcomes[name])
        draw(outcomes[name], options.results / f"units_{name}.png")
    return outcomes


if __name__ == "__main__":
    main()
