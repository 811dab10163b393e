"""What a trunk's step costs over the same architecture written by hand in plain torch.

    python -m benchmarks.architectures            # SoftSharing, CrossStitch and LTB
    python -m benchmarks.architectures --rounds 9

A step is a forward pass, the penalty if there is one, a backward pass and SGD, on one thread, without Lightning, whose
cost ``step_time.py`` has. Both sides take turns in short rounds with the parameters of one and the same trunk, and a
ratio is formed within each round; the median is printed, and half of the rounds lie in the brackets. ``compare`` takes
other trunks. Processor time, as in ``step_time.py``. The figure to reach is 1.05.
"""

# ruff: noqa: E402 - the number of threads has to be set before NumPy and torch are imported, which read it once.

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_mtl.architectures import LTB, CrossStitch, SoftSharing

TASKS = ("a", "b", "c")
Forward = Callable[[Tensor], tuple[Mapping[str, Tensor], Tensor | None]]
"""Features of each task, and a penalty or None."""


@dataclass(frozen=True)
class Comparison:
    """A trunk, its inputs, and the same written by hand on the trunk's own parameters."""

    name: str
    trunk: nn.Module
    inputs: Tensor
    by_hand: Forward


def step_time(forward: Forward, trunk: nn.Module, inputs: Tensor, steps: int) -> float:
    """The processor time of a step in milliseconds."""
    optimizer = torch.optim.SGD([p for p in trunk.parameters() if p.requires_grad], lr=1e-9)
    began = time.process_time()
    for _ in range(steps):
        optimizer.zero_grad()
        features, penalty = forward(inputs)
        objective = torch.stack([value.square().mean() for value in features.values()]).sum()
        (objective if penalty is None else objective + penalty).backward()
        optimizer.step()
    return 1e3 * (time.process_time() - began) / steps


def compare(comparison: Comparison, rounds: int) -> str:
    """One line: milliseconds by hand, the ratio, where half of the rounds lie."""
    trunk, inputs = comparison.trunk, comparison.inputs

    def ours(x: Tensor) -> tuple[Mapping[str, Tensor], Tensor | None]:
        own: dict[str, Tensor] = getattr(trunk, "penalties", dict)()
        return trunk(x), torch.stack(list(own.values())).sum() if own else None

    for name, value in ours(inputs)[0].items():
        torch.testing.assert_close(value, comparison.by_hand(inputs)[0][name], rtol=1e-4, atol=1e-5)
    steps = max(2, int(150 / step_time(comparison.by_hand, trunk, inputs, 2)))
    pairs = []
    for turn in range(rounds):
        order = [comparison.by_hand, ours] if turn % 2 else [ours, comparison.by_hand]
        times = {forward: step_time(forward, trunk, inputs, steps) for forward in order}
        pairs.append((times[comparison.by_hand], times[ours] / times[comparison.by_hand]))
    ratios = sorted(ratio for _, ratio in pairs)
    low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
    hand = statistics.median(hand for hand, _ in pairs)
    return f"{comparison.name:34} {hand:8.2f} ms  {statistics.median(ratios):5.2f}  [{low:.2f}, {high:.2f}]"


def mlp_stages() -> list[nn.Module]:
    widths = [(784, 512), (512, 512), (512, 256)]
    return [nn.Sequential(nn.Linear(*pair), nn.ReLU()) for pair in widths]


def conv_stages() -> list[nn.Module]:
    channels = [(3, 16), (16, 32), (32, 64)]
    return [nn.Sequential(nn.Conv2d(*pair, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)) for pair in channels]


BACKBONES: dict[str, tuple[Callable[[], list[nn.Module]], tuple[int, ...], list[int]]] = {
    "mlp": (mlp_stages, (128, 784), [512, 512]),
    "conv": (conv_stages, (64, 3, 32, 32), [16, 32]),
}


def soft_sharing(name: str) -> Comparison:
    stages, shape, _ = BACKBONES[name]
    trunk = SoftSharing({task: nn.Sequential(*stages()) for task in TASKS}, strength=1e-3)

    def by_hand(x: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
        layers = [torch.stack(layer) for layer in zip(*(b.parameters() for b in trunk.backbones.values()), strict=True)]
        penalty = torch.stack([(layer - layer.mean(0)).square().sum() for layer in layers]).sum()
        return {task: backbone(x) for task, backbone in trunk.backbones.items()}, 1e-3 * penalty

    return Comparison(f"SoftSharing, {name}", trunk, torch.randn(shape), by_hand)


def cross_stitch(name: str, *, per_channel: bool) -> Comparison:
    stages, shape, channels = BACKBONES[name]
    trunk = CrossStitch({task: stages() for task in TASKS}, channels=channels if per_channel else None)
    own = [list(backbone.children()) for backbone in trunk.backbones.values()]

    def by_hand(x: Tensor) -> tuple[Mapping[str, Tensor], None]:
        values = [stages[0](x) for stages in own]
        for stage in (1, 2):
            alpha = trunk.units[stage - 1]
            if per_channel and name == "conv":
                alpha = alpha[..., None, None]
            mixed = []
            for i in range(len(TASKS)):
                total = alpha[i, 0] * values[0]
                for j in range(1, len(TASKS)):
                    total = total + alpha[i, j] * values[j]
                mixed.append(total)
            values = [stages[stage](value) for stages, value in zip(own, mixed, strict=True)]
        return dict(zip(TASKS, values, strict=True)), None

    kind = "channels" if per_channel else "scalars"
    return Comparison(f"CrossStitch, {kind}, {name}", trunk, torch.randn(shape), by_hand)


def branching(name: str) -> Comparison:
    stages, shape, _ = BACKBONES[name]
    columns = [stages() for _ in TASKS]
    trunk = LTB([[column[stage] for column in columns] for stage in range(3)], TASKS)
    trunk.sample(step=0, temperature=2.0)
    noise = trunk.noise.view(3, 3, 3)

    def by_hand(x: Tensor) -> tuple[Mapping[str, Tensor], None]:
        values = [column[0](x) for column in columns]
        for stage, logits in enumerate(trunk.logits):
            noisy = logits + noise[stage]
            soft = (noisy / 2.0).softmax(1)
            choice = nn.functional.one_hot(noisy.argmax(1), 3) - soft.detach() + soft
            read = []
            for i in range(3):
                total = choice[i, 0] * values[0]
                for j in range(1, 3):
                    total = total + choice[i, j] * values[j]
                read.append(total)
            values = [column[stage + 1](v) for column, v in zip(columns, read, strict=True)] if stage < 2 else read
        return dict(zip(TASKS, values, strict=True)), None

    return Comparison(f"LTB, {name}", trunk, torch.randn(shape), by_hand)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for name in BACKBONES:
        cases = [soft_sharing(name), cross_stitch(name, per_channel=False), cross_stitch(name, per_channel=True)]
        for comparison in [*cases, branching(name)]:
            print(compare(comparison, args.rounds), flush=True)


if __name__ == "__main__":
    main()
