"""How fast batches of several tasks are loaded, against Lightning's own ``CombinedLoader``, in the same process.

    python -m benchmarks.loading             # everything
    python -m benchmarks.loading --workers 0 # in this process alone

Both yield one shuffled batch of every task a step, ``CombinedLoader(..., "max_size_cycle")`` and the data module's
``Joint()``, from data sets of different size. They take turns, in another order each round; a ratio of speeds is formed
within each round, so that other work on the machine disturbs both sides alike. The median is printed, half of the
ratios lie in the brackets. Above 1 the data module is the faster one. Without workers, times are the processor time of
the process, which other work disturbs less than the clock on the wall.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.step_time import environment
from lightning_mtl.data import MultiTaskDataModule
from lightning_mtl.data.loaders import MixedLoader

TO_REACH = 0.95
STEPS_A_ROUND = 60
SIZES = (8_000, 2_000, 500)


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory, with as much to do for each as a small augmentation takes."""

    def __init__(self, size: int, side: int) -> None:
        self.images = torch.zeros(size, 3, side, side)
        self.targets = torch.zeros(size, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index].flip(-1), self.targets[index]


@dataclass(frozen=True)
class Case:
    """Data sets of one kind, and how they are loaded."""

    name: str
    side: int
    num_tasks: int
    batch_size: int
    workers: int

    def label(self) -> str:
        return f"{self.name}, K={self.num_tasks}, batch {self.batch_size}, {self.workers} workers a task"

    def plain(self) -> CombinedLoader:
        kept = self.workers > 0
        loaders = {
            task: DataLoader(
                data, batch_size=self.batch_size, shuffle=True, num_workers=self.workers, persistent_workers=kept
            )
            for task, data in self.data().items()
        }
        return CombinedLoader(loaders, "max_size_cycle")

    def ours(self) -> MixedLoader:
        return MultiTaskDataModule(self.data(), batch_size=self.batch_size, num_workers=self.workers).train_dataloader()

    def data(self) -> dict[str, Images]:
        return {f"task{k}": Images(SIZES[k % len(SIZES)], self.side) for k in range(self.num_tasks)}


CASES = [
    Case("vectors of 12", 2, 3, 32, 0),
    Case("vectors of 12", 2, 8, 8, 0),
    Case("3 x 32 x 32", 32, 3, 32, 0),
    Case("3 x 32 x 32", 32, 3, 32, 1),
]


def endless(loader: CombinedLoader | MixedLoader) -> Iterator[object]:
    """Epoch after epoch, as a Trainer goes through them."""
    for epoch in itertools.count():
        if isinstance(loader, MixedLoader):
            loader.set_epoch(epoch)
        yield from loader


def speed(steps: Iterator[object], clock: Callable[[], float]) -> float:
    """Steps a second, over the next of them."""
    began = clock()
    for _ in itertools.islice(steps, STEPS_A_ROUND):
        pass
    return STEPS_A_ROUND / (clock() - began)


def measure(case: Case, rounds: int) -> dict[str, Any]:
    clock = time.perf_counter if case.workers else time.process_time
    sides = {"plain": endless(case.plain()), "ours": endless(case.ours())}
    order, speeds = random.Random(0), {side: list[float]() for side in sides}
    for _ in range(rounds + 1):  # the first starts workers and does not count
        for side in order.sample(sorted(sides), len(sides)):
            speeds[side].append(speed(sides[side], clock))
    ratios = [ours / plain for ours, plain in zip(speeds["ours"][1:], speeds["plain"][1:], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "case": case.label(),
        "ratio": middle,
        "quartiles": [low, high],
        "to_reach": TO_REACH,
        "steps_per_second": statistics.median(speeds["ours"][1:]),
        "plain_steps_per_second": statistics.median(speeds["plain"][1:]),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, help="only cases with so many workers a task")
    parser.add_argument("--rounds", type=int, default=41, help="rounds of 60 steps of each side; default: 41")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there, too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    about, results = environment(), []
    print(", ".join(f"{name} {value}" for name, value in {**about["machine"], **about["versions"]}.items()))
    print(f"{'case':50} {'plain':>9} {'ours':>9}   ratio  half the rounds")
    for case in CASES:
        if options.workers is not None and case.workers != options.workers:
            continue
        found = measure(case, options.rounds)
        results.append(found)
        low, high = found["quartiles"]
        verdict = "met" if found["ratio"] >= TO_REACH else "MISSED"
        print(
            f"{found['case']:50} {found['plain_steps_per_second']:7.0f}/s {found['steps_per_second']:7.0f}/s "
            f"{found['ratio']:7.3f}  [{low:.3f}, {high:.3f}]  >= {TO_REACH} {verdict}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
