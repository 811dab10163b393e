"""GradNorm's toy, two tasks and ten: equal weights, uncertainty and GradNorm, and the paper's claims beside them.

    python -m benchmarks.gradnorm_toy                          # 4,000 steps, three seeds
    python -m benchmarks.gradnorm_toy --steps 200 --seeds 1    # a look

All three start from the same weights and see the same batches. What is compared is the paper's measure, the sum over
the tasks of L_k(t) / L_k(0) on test data, which is K before training.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.gradnorm_problem import Batch, ScaledTasks, losses_on
from benchmarks.step_time import environment
from lightning_mtl import Monitor, Signals, Weighting
from lightning_mtl.weighting import GradNorm, UncertaintyWeighting

ALPHA = 0.12
METHODS: dict[str, Callable[[], Weighting | None]] = {
    "equal weights": lambda: None,
    "UncertaintyWeighting": UncertaintyWeighting,
    "GradNorm": lambda: GradNorm(alpha=ALPHA),
}
TEST_SAMPLES, LOOKS, LAST_LOOKS = 1000, 60, 6
MARGIN = 0.01


def scales_of(num_tasks: int) -> dict[str, float]:
    """(1, 100) for two tasks; else log-uniform between them, the same at every call, smallest first."""
    if num_tasks == 2:
        return {"task0": 1.0, "task1": 100.0}
    drawn = 100 ** torch.rand(num_tasks, generator=torch.Generator().manual_seed(0))
    return {f"task{place}": scale for place, scale in enumerate(sorted(drawn.tolist()))}


@dataclass(frozen=True)
class Course:
    """One training: at each look the step, L_k / L_k(0) on test data, and weights; the task of smallest scale first."""

    method: str
    num_tasks: int
    seed: int
    steps: list[int]
    ratios: list[list[float]]
    weights: list[list[float]]
    seconds: float

    @property
    def sums(self) -> list[float]:
        return [sum(ratios) for ratios in self.ratios]

    @property
    def end(self) -> list[float]:
        """The ratios in the end, a mean over the last looks: from one step to the next they jump by a hundredth."""
        return [statistics.mean(ratios) for ratios in zip(*self.ratios[-LAST_LOOKS:], strict=True)]


class Look(Monitor):
    """Keeps losses on test data, before the step, and the step's weights, every so many steps."""

    def __init__(self, test: Batch, every: int) -> None:
        self.test, self.every = test, every
        self.steps: list[int] = []
        self.losses: list[list[float]] = []
        self.weights: list[list[float]] = []

    def look(self, module: pl.LightningModule, step: int) -> None:
        self.steps.append(step)
        self.losses.append(list(losses_on(module, self.test).values()))  # type: ignore[arg-type]  # ours is

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        if trainer.global_step % self.every == 0:
            self.look(pl_module, trainer.global_step)

    def observe(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, signals: Signals, weights: Tensor | None
    ) -> None:
        if len(self.weights) < len(self.steps):
            self.weights.append([1.0] * signals.num_tasks if weights is None else weights.tolist())

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.look(pl_module, trainer.global_step)
        self.weights.append(self.weights[-1])


def train(method: str, num_tasks: int, *, seed: int, steps: int) -> Course:
    problem, began = ScaledTasks(scales_of(num_tasks), batches=steps, seed=seed), time.process_time()
    watch, weighting = Look(problem.test_batch(TEST_SAMPLES), max(1, steps // LOOKS)), METHODS[method]()
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[watch] if weighting is None else [weighting, watch],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(problem.model(), DataLoader(problem, batch_size=None))
    first = watch.losses[0]
    ratios = [[loss / start for loss, start in zip(losses, first, strict=True)] for losses in watch.losses]
    return Course(method, num_tasks, seed, watch.steps, ratios, watch.weights, time.process_time() - began)


def ends(courses: Sequence[Course], method: str, num_tasks: int) -> list[float]:
    """Σ L_k / L_k(0) in the end, a seed each."""
    return [sum(course.end) for course in courses if (course.method, course.num_tasks) == (method, num_tasks)]


def ends_of_smallest(courses: Sequence[Course], method: str, num_tasks: int) -> list[float]:
    return [course.end[0] for course in courses if (course.method, course.num_tasks) == (method, num_tasks)]


def below(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether it ends lower for every seed, by more than test losses move between two looks."""
    return all(a < (1 - MARGIN) * b for a, b in zip(one, other, strict=True))


Claim = tuple[str, Callable[[Sequence[Course]], bool]]
CLAIMS: list[Claim] = [
    (
        "K = 2: under equal weights the task of scale 100 drowns that of scale 1, which GradNorm mends",
        lambda found: below(ends_of_smallest(found, "GradNorm", 2), ends_of_smallest(found, "equal weights", 2)),
    ),
    (
        "K = 2: GradNorm ends below equal weights",
        lambda found: below(ends(found, "GradNorm", 2), ends(found, "equal weights", 2)),
    ),
    (
        "K = 10: GradNorm ends below equal weights",
        lambda found: below(ends(found, "GradNorm", 10), ends(found, "equal weights", 10)),
    ),
    (
        "K = 10: GradNorm ends below uncertainty weighting",
        lambda found: below(ends(found, "GradNorm", 10), ends(found, "UncertaintyWeighting", 10)),
    ),
    (
        "K = 10: uncertainty weighting ends above equal weights",
        lambda found: below(ends(found, "equal weights", 10), ends(found, "UncertaintyWeighting", 10)),
    ),
    (
        "K = 10: uncertainty weighting is quick at first, then gets worse (ends 5 % above its lowest)",
        lambda found: all(
            sum(course.end) > 1.05 * min(course.sums)
            for course in found
            if (course.method, course.num_tasks) == ("UncertaintyWeighting", 10)
        ),
    ),
]


def table(courses: Sequence[Course], steps: int) -> Table:
    seeds = len({course.seed for course in courses})
    shown = Table(title=f"GradNorm's toy, {steps} steps, seeds: {seeds}; mean (lowest to highest)")
    for heading in ("K", "method", "Σ L/L(0), of K", "lowest on the way", "of the smallest scale", "of the largest"):
        shown.add_column(heading, justify="left" if heading == "method" else "right")
    for num_tasks in (2, 10):
        for method in METHODS:
            found = [course for course in courses if (course.method, course.num_tasks) == (method, num_tasks)]
            shown.add_row(
                str(num_tasks) if method == "equal weights" else "",
                method,
                spread([sum(course.end) for course in found]),
                spread([min(course.sums) for course in found]),
                spread([course.end[0] for course in found]),
                spread([course.end[-1] for course in found]),
                end_section=method == "GradNorm",
            )
    return shown


def spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results"), metavar="FOLDER")
    options = parser.parse_args(argv)
    if options.steps < 1 or options.seeds < 1:
        parser.error("--steps and --seeds must be at least 1")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    console, courses = Console(highlight=False), []
    for num_tasks in (2, 10):
        for seed in range(options.seeds):
            for method in METHODS:
                course = train(method, num_tasks, seed=seed, steps=options.steps)
                courses.append(course)
                console.print(
                    f"K={num_tasks:<2} seed {seed} {method:20} {sum(course.end):7.3f} {course.seconds:6.1f} s"
                )
    console.print("", table(courses, options.steps))
    claims = {claim: holds(courses) for claim, holds in CLAIMS}
    console.print("\nThe paper's claims, each asked of every seed:")
    for claim, agrees in claims.items():
        console.print(f"  {'agrees' if agrees else 'DISAGREES':9}  {claim}", soft_wrap=True)

    # Not at the top: only the picture needs matplotlib.
    from benchmarks.gradnorm_picture import draw

    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "gradnorm_toy.json"
    about = {
        **environment(),
        "seeds": list(range(options.seeds)),
        "steps": options.steps,
        "alpha": ALPHA,
        "adam_lr": 1e-3,
    }
    scales = {num_tasks: list(scales_of(num_tasks).values()) for num_tasks in (2, 10)}
    results = [asdict(course) for course in courses]
    path.write_text(json.dumps({**about, "scales": scales, "claims": claims, "results": results}) + "\n")
    draw(courses, scales).savefig(path.with_suffix(".png"), dpi=120)
    console.print(f"\nwritten: {path}, {path.with_suffix('.png')}", soft_wrap=True)


if __name__ == "__main__":
    main()
