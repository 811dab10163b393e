"""What a step on two processes costs with each way of weighting, over plain Lightning, and what it sends.

    python -m benchmarks.distributed                   # an MLP and convolutions, K = 2, 8
    python -m benchmarks.distributed --only mlp K=8    # rows whose name holds every word
    python -m benchmarks.distributed --json PATH

Starts two processes that train with DistributedDataParallel over gloo, each with half of the batch. Variants take
turns in short rounds, and ratios are formed within a round; half the rounds' ratios lie in the brackets. Times are by
the clock on the wall: the processes wait for each other. Bytes are what a rank puts into collectives in a step, counted
where they begin: at the reducer's buckets and at ``torch.distributed.all_reduce``. The last column has them over the
least that must travel, in float32: every gradient once, and K times the trunk's where K rows are averaged.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: a core for each process

import argparse
import itertools
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks.step_cases import TRUNKS, Case, Repeated
from benchmarks.step_time import environment
from lightning_mtl import Weighting
from lightning_mtl.weighting import MGDA, GradNorm, UncertaintyWeighting

RANKS, WARM_UP, STEPS = 2, 5, 15
VARIANTS: dict[str, Callable[[], Weighting | None]] = {
    "plain Lightning": lambda: None,
    "equal weights": lambda: None,
    "UncertaintyWeighting": UncertaintyWeighting,
    "MGDA features": lambda: MGDA(at="features"),
    "GradNorm last_layer": GradNorm,
    "MGDA trunk": MGDA,
    "MGDA trunk, rows": lambda: MGDA(gradients="rows"),
}


class WallClock(pl.Callback):
    def __init__(self) -> None:
        self.begun: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:  # noqa: ANN401
        self.begun.append(time.perf_counter())


class Traffic(pl.Callback):
    """Counts the bytes that go into collectives in the batches after the first, one figure a batch."""

    def __init__(self) -> None:
        self.reducer = self.others = 0
        self.counted: list[tuple[int, int]] = []
        self._all_reduce, self._all_gather = dist.all_reduce, dist.all_gather

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:  # noqa: ANN401
        assert isinstance(trainer.strategy.model, DistributedDataParallel)  # noqa: S101 - what was asked for
        trainer.strategy.model.register_comm_hook(None, self._in_bucket)
        dist.all_reduce = self._counting
        dist.all_gather = self._counting_gathered  # type: ignore[assignment]

    def on_train_batch_start(self, *_: Any) -> None:  # noqa: ANN401
        self.reducer = self.others = 0

    def on_train_batch_end(self, *_: Any) -> None:  # noqa: ANN401
        self.counted.append((self.reducer, self.others))

    def on_train_end(self, *_: Any) -> None:  # noqa: ANN401
        dist.all_reduce, dist.all_gather = self._all_reduce, self._all_gather

    def _in_bucket(self, _: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        self.reducer += bucket.buffer().nbytes
        self.others -= bucket.buffer().nbytes  # which the hook is about to add
        return allreduce_hook(None, bucket)  # type: ignore[arg-type]  # None is the default group

    def _counting(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        self.others += tensor.nbytes
        return self._all_reduce(tensor, *args, **kwargs)

    def _counting_gathered(self, found: list[Tensor], tensor: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        self.others += tensor.nbytes
        return self._all_gather(found, tensor, *args, **kwargs)


@dataclass
class Fits:
    """A model and half a batch, trained again and again."""

    case: Case
    rank: int

    def __post_init__(self) -> None:
        inputs, targets = self.case.batch
        mine = slice(self.rank, None, RANKS)
        self.batch = inputs[mine], {task: target[mine] for task, target in targets.items()}

    def fit(self, variant: str, steps: int, *callbacks: pl.Callback) -> None:
        weighting = VARIANTS[variant]()
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=RANKS,
            strategy=DDPStrategy(process_group_backend="gloo"),
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[*callbacks, *([] if weighting is None else [weighting])],
        )
        trainer.fit(self.case.module(plain=variant == "plain Lightning"), Repeated(self.batch, steps + 1))

    def seconds(self, variant: str) -> float:
        """The median step of a round."""
        clock = WallClock()
        self.fit(variant, WARM_UP + STEPS, clock)
        begun = clock.begun[WARM_UP:]
        return statistics.median(after - before for before, after in itertools.pairwise(begun))

    def traffic(self, variant: str) -> tuple[int, int]:
        """Bytes of a step: through DDP's reducer, and beside it."""
        traffic = Traffic()
        self.fit(variant, 3, traffic)
        return traffic.counted[1]


def measure(trunk: str, num_tasks: int, rank: int, rounds: int, words: Sequence[str]) -> list[dict[str, Any]]:
    """Time all variants of one model in turns; every rank has to come along, rank 0 reports."""
    name = f"{trunk} K={num_tasks}"
    chosen = [variant for variant in VARIANTS if all(word in f"{name} {variant}" for word in words)]
    if not chosen:
        return []
    fits = Fits(Case(trunk, num_tasks, STEPS, log_dir=""), rank)
    timed = list(dict.fromkeys(["plain Lightning", *chosen]))
    times: dict[str, list[float]] = {variant: [] for variant in timed}
    for turn in range(rounds):
        for variant in timed if turn % 2 else reversed(timed):
            times[variant].append(fits.seconds(variant))
    parts = fits.case.parts()
    shared = sum(p.numel() for p in parts[0].parameters())
    heads = sum(p.numel() for head in parts[1].values() for p in head.parameters())
    found = []
    for variant in chosen:
        reducer, others = fits.traffic(variant)
        ratios = [a / b for a, b in zip(times[variant], times["plain Lightning"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        found.append(
            {
                "trunk": trunk,
                "num_tasks": num_tasks,
                "variant": variant,
                "step_ms": statistics.median(times[variant]) * 1e3,
                "ratio": middle,
                "quartiles": [low, high],
                "reducer_bytes": reducer,
                "other_bytes": others,
                "shared_parameters": shared,
                "head_parameters": heads,
            }
        )
    return found


def least(row: dict[str, Any]) -> int:
    """How many numbers have to travel: every gradient once, the trunk's once a task where rows are averaged.

    At the trunk, layers with few samples need not average rows, and stay below that.
    """
    tasks, shared, heads = (int(row[name]) for name in ("num_tasks", "shared_parameters", "head_parameters"))
    return tasks * shared + heads if row["variant"].startswith("MGDA trunk") else shared + heads


def show(row: dict[str, Any]) -> None:
    low, high = row["quartiles"]
    total = row["reducer_bytes"] + row["other_bytes"]
    print(
        f"{row['trunk']:4} K={row['num_tasks']:<2} {row['variant']:22}{row['step_ms']:9.2f} ms {row['ratio']:7.3f}  "
        f"[{low:.3f}, {high:.3f}] {row['reducer_bytes']:12,} {row['other_bytes']:12,} {total / 4 / least(row):10.3f}",
        flush=True,
    )


def work(options: argparse.Namespace) -> None:
    """What each of the two processes does."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo", init_method=f"file://{options.rendezvous}", rank=options.rank, world_size=RANKS)
    if options.rank == 0:
        print(json.dumps(environment()))
        print(f"{'':30}{'step':>12} {'ratio':>7}  {'quartiles':14} {'DDP bytes':>12} {'others':>12} {'over least':>10}")
    rows = []
    for trunk in TRUNKS:
        for num_tasks in (2, 8):
            found = measure(trunk, num_tasks, options.rank, options.rounds, options.only)
            rows += found
            for row in found if options.rank == 0 else ():
                show(row)
    if options.rank == 0 and options.json is not None:
        options.json.write_text(json.dumps({**environment(), "rows": rows}, indent=2) + "\n")
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows whose name holds every word")
    parser.add_argument("--rounds", type=int, default=7, help="how often the variants take turns")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there, too")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rendezvous", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error("--rounds must be at least 2, for a spread.")
    if options.rank is not None:
        work(options)
        return
    given = list(sys.argv[1:] if arguments is None else arguments)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.distributed", *given, "--rendezvous", str(Path(folder) / "meet")]
        processes = [
            subprocess.Popen(
                [*command, "--rank", str(rank)],
                env=os.environ | {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(RANKS)},
            )
            for rank in range(RANKS)
        ]
        try:
            codes = [process.wait() for process in processes]
        finally:
            for process in processes:
                process.kill()
    if any(codes):
        raise SystemExit(f"The processes ended with {codes}.")


if __name__ == "__main__":
    main()
