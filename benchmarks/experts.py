"""What a step of an architecture costs, against the same architecture written by hand in plain torch.

    python -m benchmarks.experts                 # everything
    python -m benchmarks.experts --quick         # few rounds, few sizes

A step is a forward and a backward pass of the trunk alone, on one thread. Both sides take turns in short rounds, and
ratios are formed within each round: the median is printed, with half of the rounds in the brackets. Times are the
processor time of the process, which what else runs on the machine disturbs less than the clock on the wall.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import experts_by_hand as by_hand
from benchmarks.step_time import environment, keep_freed_memory
from lightning_mtl.architectures import CGC, MTAN, PLE, MMoE

TASKS = ("a", "b", "c")
TARGET = 1.05
SECONDS_A_ROUND = 0.15


@dataclass(frozen=True)
class Row:
    """One line: two trunks that do the same, and what both take."""

    name: str
    ours: nn.Module
    theirs: nn.Module
    x: Tensor


def rows(quick: bool) -> Iterator[Row]:
    for batch in (256,) if quick else (32, 256):
        for width in (64,) if quick else (32, 128, 256):
            x, shape = torch.randn(batch, width), f"width {width:3} batch {batch:3}"

            def expert(width: int = width) -> nn.Module:
                return by_hand.mlp(width, width)

            for number in (8,) if quick else (4, 8, 16):
                ours = MMoE(expert, TASKS, width, num_experts=number)
                name = f"MMoE {number:2} experts {shape}"
                yield Row(f"{name} / loop", ours, by_hand.MMoE(width, number, TASKS), x)
                yield Row(f"{name} / bmm", ours, by_hand.BatchedMMoE(width, number, TASKS), x)
                listed = MMoE([expert() for _ in range(number)], TASKS, width)
                yield Row(f"{name}, given as a list / loop", listed, by_hand.MMoE(width, number, TASKS), x)
            cgc = CGC(expert, TASKS, width, task_experts=2, shared_experts=2)
            yield Row(f"CGC 2 + 2 experts {shape} / loop", cgc, by_hand.PLE(width, 1, 2, 2, TASKS), x)
            ple = PLE([expert] * 2, TASKS, [width] * 2, task_experts=2, shared_experts=2)
            yield Row(f"PLE 2 levels {shape} / loop", ple, by_hand.PLE(width, 2, 2, 2, TASKS), x)
    for size in (32,) if quick else (16, 32):
        channels = (16, 32, 64)
        x = torch.randn(16, 3, size, size)
        name = f"MTAN 3 stages {size}x{size} batch 16 / by hand"
        yield Row(name, MTAN(stages(channels), TASKS, channels), by_hand.MTAN(stages(channels), TASKS, channels), x)


def stages(channels: Sequence[int]) -> list[nn.Module]:
    found: list[nn.Module] = []
    for a, b in zip((3, *channels), channels, strict=False):
        convolution = (nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        found.append(nn.Sequential(*([] if a == 3 else [nn.MaxPool2d(2)]), *convolution))
    return found


def step(trunk: nn.Module, x: Tensor) -> Callable[[], None]:
    def once() -> None:
        for parameter in trunk.parameters():
            parameter.grad = None
        torch.stack([z.square().mean() for z in trunk(x).values()]).sum().backward()

    return once


def seconds(run: Callable[[], None], times: int) -> float:
    began = time.process_time()
    for _ in range(times):
        run()
    return (time.process_time() - began) / times


def measure(row: Row, rounds: int) -> dict[str, Any]:
    """Let both sides take turns; the ratio's median and quartiles."""
    ours, theirs = step(row.ours, row.x), step(row.theirs, row.x)
    seconds(ours, 3)
    times = max(3, round(SECONDS_A_ROUND / seconds(theirs, 3)))
    taken = []
    for number in range(rounds):
        first, second = (ours, theirs) if number % 2 else (theirs, ours)
        pair = (seconds(first, times), seconds(second, times))
        taken.append(pair if number % 2 else pair[::-1])
    low, middle, high = statistics.quantiles([a / b for a, b in taken], n=4, method="inclusive")
    return {
        "row": " ".join(row.name.split()),
        "ratio": middle,
        "quartiles": [low, high],
        "step_ms": statistics.median(a for a, _ in taken) * 1e3,
        "over_ms": statistics.median(b for _, b in taken) * 1e3,
        "target": TARGET,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, few sizes")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="lines whose name holds every word")
    parser.add_argument("--rounds", type=int, help="how often both sides take turns; 9, or 5 with --quick")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there, too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_freed_memory()
    about, results = environment(), []
    print(", ".join(f"{name} {value}" for name, value in {**about["machine"], **about["versions"]}.items()))
    print(f"{'ours / in plain torch':62} ours, ms  plain, ms  ratio  half the rounds")
    for row in rows(options.quick):
        if not all(word in row.name for word in options.only):
            continue
        result = measure(row, options.rounds or (5 if options.quick else 9))
        results.append(result)
        low, high = result["quartiles"]
        verdict = "" if result["ratio"] <= TARGET else f"  above {TARGET}"
        print(
            f"{row.name:62} {result['step_ms']:8.2f} {result['over_ms']:10.2f} {result['ratio']:6.3f}  "
            f"[{low:.3f}, {high:.3f}]{verdict}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps({**about, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
