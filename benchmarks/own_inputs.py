"""What a step costs whose tasks have inputs of their own: the trunk once a task, or once on all of them.

    python -m benchmarks.own_inputs
    python -m benchmarks.own_inputs --rounds 3      # less steady

Each task has a batch of its own; the two ways take turns in short rounds, and a ratio is formed within each round. The
median is printed, with half of the rounds' ratios in the brackets. Also: what looking for missing labels costs, of
tasks that declare them, over the same tasks without. Times are the processor time of one thread.
"""

# ruff: noqa: E402 - the number of threads has to be set before NumPy and torch are imported, which read it once.

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import argparse
import functools
import itertools
import logging
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.step_cases import CLASSES, LEARNING_RATE, TRUNKS, WARM_UP, Repeated, StepClock
from benchmarks.step_time import keep_freed_memory
from lightning_mtl import MultiTaskModule, Task, Weighting
from lightning_mtl.weighting import MGDA, GradNorm

STEPS = 12
NUM_TASKS = (2, 4, 8)
SAMPLES = (8, 32)  # of each task
WEIGHTINGS: dict[str, Callable[[], list[Weighting]]] = {
    "equal weights": list,
    "GradNorm last_layer": lambda: [GradNorm()],
    "MGDA trunk": lambda: [MGDA()],
}


def tasks_of(num_tasks: int) -> list[str]:
    return [f"task_{k}" for k in range(num_tasks)]


def module(trunk: str, num_tasks: int, *, missing: int | None = None, concatenates: bool = False) -> MultiTaskModule:
    torch.manual_seed(0)
    shared = TRUNKS[trunk].make()
    width = shared(torch.zeros(1, *TRUNKS[trunk].inputs[1:])).shape[1]
    return MultiTaskModule(
        shared,
        {task: nn.Linear(width, CLASSES) for task in tasks_of(num_tasks)},
        {task: Task(cross_entropy, missing=missing) for task in tasks_of(num_tasks)},
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=LEARNING_RATE),
        concatenate_inputs=concatenates,
    )


def own_batches(trunk: str, num_tasks: int, samples: int) -> dict[str, Any]:
    shape = (samples, *TRUNKS[trunk].inputs[1:])
    return {task: (torch.randn(shape), torch.randint(CLASSES, (samples,))) for task in tasks_of(num_tasks)}


def joint_batch(trunk: str, num_tasks: int) -> Any:  # noqa: ANN401
    size = TRUNKS[trunk].inputs[0]
    targets = {task: torch.randint(CLASSES, (size,)) for task in tasks_of(num_tasks)}
    # A fifth is missing.
    targets = {task: target.masked_fill(torch.rand(size) < 0.2, -100) for task, target in targets.items()}
    return torch.randn(TRUNKS[trunk].inputs), targets


def seconds_a_step(model: MultiTaskModule, batch: Any, make: Callable[[], list[Weighting]]) -> float:  # noqa: ANN401
    clock = StepClock()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[clock, *make()],
    )
    trainer.fit(model, Repeated(batch, WARM_UP + STEPS + 1))
    return statistics.median(after - before for before, after in itertools.pairwise(clock.begun[WARM_UP:]))


def compare(name: str, ours: Callable[[], float], over: Callable[[], float], rounds: int) -> None:
    """Print the ratio of two ways that take turns."""
    pairs = [(ours(), over()) for _ in range(rounds)]
    ratios = sorted(a / b for a, b in pairs)
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    step = statistics.median(a for a, _ in pairs)
    print(f"{name:64} {step * 1e3:8.2f} ms {middle:7.3f}  [{low:.3f}, {high:.3f}]", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Tasks with inputs of their own; labels that may be missing.")
    parser.add_argument("--rounds", type=int, default=9, help="default: 9")
    rounds = parser.parse_args(argv).rounds
    torch.set_num_threads(1)
    keep_freed_memory()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    print(f"{'concatenated / once a task':64} {'step':>11} {'ratio':>7}")
    for trunk, samples, num_tasks in itertools.product(TRUNKS, SAMPLES, NUM_TASKS):
        batch = own_batches(trunk, num_tasks, samples)
        separate, together = (module(trunk, num_tasks, concatenates=way) for way in (False, True))
        for name, make in WEIGHTINGS.items():
            compare(
                f"{trunk} K={num_tasks} {samples} samples a task, {name}",
                functools.partial(seconds_a_step, together, batch, make),
                functools.partial(seconds_a_step, separate, batch, make),
                rounds,
            )
    print(f"\n{'missing=-100 / ignore_index of the loss':64} {'step':>11} {'ratio':>7}")
    for trunk, num_tasks in itertools.product(TRUNKS, (*NUM_TASKS, 40)):
        joint = joint_batch(trunk, num_tasks)
        plain, looking = (module(trunk, num_tasks, missing=missing) for missing in (None, -100))
        compare(
            f"{trunk} K={num_tasks} equal weights",
            functools.partial(seconds_a_step, looking, joint, list),
            functools.partial(seconds_a_step, plain, joint, list),
            rounds,
        )


if __name__ == "__main__":
    main()
