"""How far physics-informed networks come, as the loss of the boundary is scaled by 0.01, 1, 100 and 10,000.

Helmholtz' and Burgers' equations of ``examples/equations.py``; each training has the same steps, the same network, and
Adam with the same falling learning rate. Scaled are the losses of all conditions: the boundary, and the initial values
of Burgers' equation. What counts is the relative L2 error against the reference solution after the last step, so that a
method that does not depend on the scale has a flat line. Fixed weights are tuned by that very error, which no user
knows; at another scale the tuned weight is divided by it, which makes the same training, so that they train once.

    python -m benchmarks.physics --json benchmarks/results/physics.json --png benchmarks/results/physics.png

Each cell is written to the JSON file as it ends, and a second start goes on from there.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

from benchmarks.store import Store
from equations import EQUATIONS, Batches, PhysicsInformed
from lightning_mtl import Weighting
from lightning_mtl import weighting as methods
from program import quieten

SCALES = (0.01, 1.0, 100.0, 10_000.0)
STEPS, SEEDS = 2_500, 5
EQUAL, TUNED, INITIAL = "equal weights", "fixed weights, tuned", 'Task(loss_scale="initial")'
TUNED_FROM = (1.0, 10.0, 100.0, 1_000.0)  # what the conditions' losses are multiplied by, at scale 1
# With the defaults, but for those that the papers or their code measure more rarely.
METHODS: dict[str, Callable[[], Weighting | None]] = {
    EQUAL: lambda: None,
    INITIAL: lambda: None,
    "SoftAdapt": lambda: methods.SoftAdapt(normalized=True),
    "ReLoBRaLo": methods.ReLoBRaLo,
    "UncertaintyWeighting": methods.UncertaintyWeighting,
    "ScaleInvariant": methods.ScaleInvariant,
    "GradientNormBalance": methods.GradientNormBalance,
    "LRAnnealing": lambda: methods.LRAnnealing(every_n_steps=10),
    "NTKWeighting": lambda: methods.NTKWeighting(every_n_steps=10),
    "GradNorm": lambda: methods.GradNorm(at="trunk"),
    "MGDA": methods.MGDA,
    "NashMTL": methods.NashMTL,
    "ConFIG": methods.ConFIG,
    "Rotating(ConFIG)": lambda: methods.Rotating(methods.ConFIG()),
}


@dataclass(frozen=True)
class Cell:
    """One training."""

    equation: str
    row: str
    scale: float
    seed: int
    steps: int
    weight: float = 1.0  # of the conditions, beside 1 for the residual


def train(cell: Cell) -> dict[str, Any]:
    """Run a cell: its error at the end, and the median processor time of a step."""
    quieten()
    warnings.filterwarnings("ignore", "In the first step the loss of task")  # what this is about
    torch.set_num_threads(1)
    torch.manual_seed(cell.seed)
    equation = EQUATIONS[cell.equation]()
    conditions = equation.tasks[1:]
    divisor: Literal["initial"] | None = "initial" if cell.row == INITIAL else None
    scales = dict.fromkeys(conditions, cell.scale)
    module = PhysicsInformed(equation, cell.steps, scales=scales, loss_scale=divisor)
    weighting = (
        methods.StaticWeights(dict.fromkeys(conditions, cell.weight)) if cell.row == TUNED else METHODS[cell.row]()
    )
    watch = Watch()
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[watch] if weighting is None else [weighting, watch],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Batches(equation, cell.steps, cell.seed), batch_size=None))
    return asdict(cell) | {"error": module.error(), "step_ms": watch.step_ms()}


class Watch(pl.Callback):
    """The processor time from each step's beginning to the next one's."""

    def __init__(self) -> None:
        self.began: list[float] = []

    def on_train_batch_start(self, *_: object) -> None:
        self.began.append(time.process_time())

    def step_ms(self) -> float:
        return 1e3 * statistics.median(
            after - before for before, after in zip(self.began, self.began[1:], strict=False)
        )


def run(cells: Sequence[Cell], store: Store, jobs: int) -> None:
    """Train the cells that are not done yet, several at once."""
    missing = [cell for cell in cells if store.find(cell) is None]
    for number, result in enumerate(_trained(missing, jobs), 1):
        store.add(result)
        print(
            f"{number:4}/{len(missing)} {result['equation']:10} {result['row']:26} x {result['scale']:<8g}"
            f"seed {result['seed']}  error {result['error']:.4f}  {result['step_ms']:.2f} ms",
            flush=True,
        )


def _trained(cells: Sequence[Cell], jobs: int) -> Iterator[dict[str, Any]]:
    if jobs == 1:
        yield from map(train, cells)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(train, cell) for cell in cells]):
            yield future.result()


def tuned_weight(equation: str, store: Store, steps: int, seeds: int) -> float:
    """The weight of the conditions with the least mean error, over the seeds for tuning."""
    errors = {}
    for weight in TUNED_FROM:
        found = [store.find(cell) for cell in tuning_cells(equation, steps, seeds) if cell.weight == weight]
        errors[weight] = statistics.mean(math.log(one["error"]) for one in found if one is not None)
    return min(errors, key=errors.__getitem__)


def tuning_cells(equation: str, steps: int, seeds: int) -> list[Cell]:
    """The trainings that choose fixed weights: two seeds for each, at scale 1."""
    return [Cell(equation, TUNED, 1.0, seed, steps, weight) for weight in TUNED_FROM for seed in range(min(2, seeds))]


def errors_of(store: Store, equation: str, row: str, scale: float, steps: int, weight: float = 1.0) -> list[float]:
    """The errors of all seeds."""
    wanted = {"equation": equation, "row": row, "scale": scale, "steps": steps, "weight": weight}
    return [r["error"] for r in store.results if all(r[name] == value for name, value in wanted.items())]


Table = dict[str, dict[str, list[list[float]]]]
"""``{equation: {row: for each scale, the errors of all seeds}}``."""


def table_of(store: Store, options: argparse.Namespace, chosen: Mapping[str, float]) -> Table:
    """Collect what is done; tuned weights have the same errors at each scale."""
    found: Table = {}
    for equation in options.equations:
        rows = {
            row: [errors_of(store, equation, row, scale, options.steps) for scale in options.scales]
            for row in options.rows
        }
        if equation in chosen:
            tuned = errors_of(store, equation, TUNED, 1.0, options.steps, chosen[equation])
            rows[TUNED] = [tuned for _ in options.scales]
        found[equation] = {row: errors for row, errors in rows.items() if all(errors)}
    return found


def show(table: Table, scales: Sequence[float], chosen: Mapping[str, float]) -> None:
    """Print the medians over the seeds, and what is between the least and the largest of them over the scales."""
    for equation, rows in table.items():
        print(f"\n{equation}: relative L2 error, median over the seeds; the conditions' losses times")
        print(f"{'':28}" + "".join(f"{scale:>10g}" for scale in scales) + "   largest / least")
        for row, errors in rows.items():
            medians = [statistics.median(seeds) for seeds in errors]
            label = f"{row} ({chosen[equation]:g})" if row == TUNED else row
            cells = "".join(f"{value:10.4f}" for value in medians)
            print(f"{label:28}{cells}{max(medians) / min(medians):12.1f}")


def draw(table: Table, scales: Sequence[float], path: Path) -> None:
    """Draw each row's error over the scale, the spread of the seeds as a band."""
    figure = Figure(figsize=(6.5 * len(table), 5), layout="constrained")
    for axes, (equation, rows) in zip(figure.subplots(1, len(table), squeeze=False)[0], table.items(), strict=True):
        for index, (row, errors) in enumerate(rows.items()):
            medians = [statistics.median(seeds) for seeds in errors]
            color, line = {EQUAL: ("black", "-"), TUNED: ("black", "--")}.get(
                row, (f"C{index % 10}", "-" if index < 10 else ":")
            )
            axes.plot(scales, medians, color=color, linestyle=line, marker=".", label=row)
            axes.fill_between(scales, [min(e) for e in errors], [max(e) for e in errors], color=color, alpha=0.08)
        axes.set(xscale="log", yscale="log", title=equation, xlabel="factor before the conditions' losses")
        axes.set_ylabel("relative L2 error")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=110)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--equations", nargs="+", default=list(EQUATIONS), choices=list(EQUATIONS))
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="rows whose name holds one of them")
    parser.add_argument("--scales", type=float, nargs="+", default=list(SCALES), metavar="FACTOR")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"default: {SEEDS}")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of a training, default: {STEPS:,}")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at once, default: 2")
    parser.add_argument("--json", type=Path, metavar="PATH", help="keep the figures there, and go on from them")
    parser.add_argument("--png", type=Path, metavar="PATH", help="draw them")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.steps < 2 or options.jobs < 1:
        parser.error("--seeds and --jobs must be at least 1, --steps at least 2")
    options.rows = [row for row in METHODS if any(word in row for word in options.only)]
    return options


def main(arguments: Sequence[str] | None = None) -> Table:
    options = parse(arguments)
    quieten()
    store, seeds, steps = Store(options.json), range(options.seeds), options.steps
    # Seed by seed, so that an interrupted run has whole tables of fewer seeds.
    cells = [
        Cell(equation, row, scale, seed, steps)
        for seed in seeds
        for equation in options.equations
        for row in options.rows
        for scale in options.scales
    ]
    tunes = any(word in TUNED for word in options.only)
    tuning = [cell for equation in options.equations for cell in tuning_cells(equation, steps, options.seeds)]
    run([*(tuning if tunes else []), *cells], store, options.jobs)
    chosen = {e: tuned_weight(e, store, steps, options.seeds) for e in options.equations} if tunes else {}
    run(
        [Cell(e, TUNED, 1.0, seed, steps, weight) for e, weight in chosen.items() for seed in seeds],
        store,
        options.jobs,
    )
    table = table_of(store, options, chosen)
    show(table, options.scales, chosen)
    if options.png:
        draw(table, options.scales, options.png)
    return table


if __name__ == "__main__":
    main()
