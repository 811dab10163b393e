"""Solve a differential equation with a network: equal weights beside a method that weighs the losses.

    python examples/physics.py
    python examples/physics.py --equation burgers --weighting LRAnnealing
    python examples/physics.py --scale 100 --weighting NTKWeighting

The losses are the equation's residual at random points and its boundary conditions, for Burgers' equation its initial
values, too; ``--scale`` is a factor before the conditions' losses, as other units would give them. The error is that of
the network against a reference solution, which the program computes by other means. Ends with a table and a picture.
The module to copy is ``PhysicsInformed`` in ``equations.py``.
"""

from __future__ import annotations

import argparse
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from equations import EQUATIONS, Batches, Equation, PhysicsInformed
from lightning_mtl import Weighting
from lightning_mtl import weighting as methods
from lightning_mtl.monitors.figures import blank_figure
from program import positive, progress_display, quieten

EQUAL = "equal weights"
OFTEN = 20  # steps between two looks at the error


@dataclass
class Run:
    """What a training has come to."""

    solution: Tensor
    error: float
    steps: list[int]
    errors: list[float]
    weights: dict[str, list[float]]


class Watch(pl.Callback):
    """Notes the error and the weights now and then, and moves a bar on."""

    def __init__(self, module: PhysicsInformed, advance: Callable[[int], None]) -> None:
        self.module, self.advance = module, advance
        self.steps: list[int] = []
        self.errors: list[float] = []
        self.weights: dict[str, list[float]] = {task: [] for task in module.tasks}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:  # noqa: ANN401 - Lightning's
        if trainer.global_step % OFTEN == 0:
            self.steps.append(trainer.global_step)
            self.errors.append(self.module.error())
            for task, weights in self.weights.items():
                # The Trainer's newest figures; without a weighting there are none.
                weights.append(float(trainer.callback_metrics.get(f"weight/{task}", torch.tensor(1.0))))
            self.advance(OFTEN)


def solve(
    equation: Equation, weighting: Weighting | None, options: argparse.Namespace, advance: Callable[[int], None]
) -> Run:
    """Train one network."""
    torch.manual_seed(options.seed)
    scales = dict.fromkeys(equation.tasks[1:], options.scale)
    module = PhysicsInformed(equation, options.steps, scales=scales)
    watch = Watch(module, advance)
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[watch] if weighting is None else [weighting, watch],
        accelerator="cpu",  # faster than a GPU for a network of this size
        log_every_n_steps=OFTEN,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Batches(equation, options.steps, options.seed), batch_size=None))
    with torch.no_grad():
        solution = module.net(module.solution[0])[..., 0]
    return Run(solution, module.error(), watch.steps, watch.errors, watch.weights)


def table(runs: Mapping[str, Run], tasks: Sequence[str]) -> Table:
    found = Table(title="Relative L2 error of the solution, and the last weights")
    for column in ("", "error", *tasks):
        found.add_column(column, justify="right" if column else "left")
    for name, run in runs.items():
        found.add_row(name, f"{run.error:.4f}", *(f"{run.weights[task][-1]:.3g}" for task in tasks))
    return found


def draw(equation: Equation, runs: Mapping[str, Run], path: Path) -> None:
    """The reference, each solution and its error, and the course of errors and weights."""
    figure = blank_figure(11, 3.1 * (len(runs) + 1))
    cells = figure.subplots(len(runs) + 1, 3)
    grid, reference = equation.reference()
    extent = (
        float(grid[..., 0].min()),
        float(grid[..., 0].max()),
        float(grid[..., 1].min()),
        float(grid[..., 1].max()),
    )

    def show(axes: Any, values: Tensor, title: str, largest: float, colors: str) -> None:  # noqa: ANN401 - matplotlib's
        image = axes.imshow(
            values.T.numpy(), extent=extent, origin="lower", aspect="auto", vmin=-largest, vmax=largest, cmap=colors
        )
        axes.set(title=title, xlabel=equation.axes[0], ylabel=equation.axes[1])
        figure.colorbar(image, ax=axes)

    size = float(reference.abs().max())
    wrong = max(float((run.solution - reference).abs().max()) for run in runs.values())
    show(cells[0, 0], reference, "reference solution", size, "viridis")
    for row, (name, run) in enumerate(runs.items(), 1):
        show(cells[row, 0], run.solution, name, size, "viridis")
        show(cells[row, 1], run.solution - reference, f"its error: {run.error:.3f} relative", wrong, "RdBu")
        for task, weights in run.weights.items():
            cells[row, 2].plot(run.steps, weights, label=task)
        cells[row, 2].set(title="weights", xlabel="step")
        cells[row, 2].set_yscale("symlog", linthresh=0.01)  # some methods' weights have both signs
        cells[row, 2].legend(fontsize=8)
        cells[0, 1].plot(run.steps, run.errors, label=name)
    cells[0, 1].set(title="relative L2 error", xlabel="step", yscale="log")
    cells[0, 1].legend(fontsize=8)
    cells[0, 2].axis("off")
    figure.savefig(path, dpi=110)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--equation", choices=list(EQUATIONS), default="helmholtz")
    parser.add_argument("--weighting", default="ConFIG", metavar="NAME", help="a method of the package")
    parser.add_argument("--scale", type=float, default=1.0, help="factor before the conditions' losses")
    parser.add_argument("--steps", type=positive, default=3000, help="of each training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("physics.png"), help="where to draw")
    options = parser.parse_args(arguments)
    if not options.scale > 0:
        parser.error(f"--scale {options.scale} must be above 0.")
    if options.steps < OFTEN:
        parser.error(f"--steps {options.steps} must be at least {OFTEN}.")
    try:
        options.method = make(options.weighting)
    except (AttributeError, TypeError) as error:
        parser.error(f"--weighting {options.weighting} cannot be taken: {error}")
    return options


def make(name: str) -> Weighting:
    """A method with its defaults, at all shared parameters: there is no trunk whose output could be measured at."""
    method: type[Weighting] = getattr(methods, name)
    at = inspect.signature(method).parameters.get("at")
    return method() if at is None or at.default == "trunk" else method(at="trunk")


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    options, console = parse(arguments), Console()
    quieten()
    # What this is about; Lightning's users see it once.
    warnings.filterwarnings("ignore", "In the first step the loss of task")
    torch.set_num_threads(1)  # the network is too small to share
    equation, runs = EQUATIONS[options.equation](), dict[str, Run]()
    with progress_display(console) as progress:
        bar = progress.add_task("", total=2 * options.steps)
        for name, weighting in ((EQUAL, None), (options.weighting, options.method)):
            progress.update(bar, description=name)
            runs[name] = solve(equation, weighting, options, lambda steps: progress.advance(bar, steps))
    console.print(table(runs, equation.tasks))
    draw(equation, runs, options.picture)
    console.print(f"Solutions, errors and weights: {options.picture}", highlight=False, soft_wrap=True)
    return {name: run.error for name, run in runs.items()}


if __name__ == "__main__":
    main()
