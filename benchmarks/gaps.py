"""How many steps a method takes to bridge a gap between the units of two losses.

Two regressions of noise, so that their losses stay what they are, the second times the gap: 10, 1,000 and 100,000. A
gap counts as bridged once the first task weighs at least half as much as the second in the sum of losses,
w_1 L_1 >= w_2 L_2 / 2. The model is trained by Adam at 1e-3; the methods have their defaults, and those that learn
weights learn them at 1e-3 in a second row. Two ways without a method stand beside them.

    python -m benchmarks.gaps --json benchmarks/results/gaps.json
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, IterableDataset

from benchmarks.step_time import environment
from lightning_mtl import MultiTaskModule, Task, Weighting
from lightning_mtl.weighting import DWA, FAMO, IMTLL, GradNorm, NashMTL, ScaleInvariant, UncertaintyWeighting

Scale = Literal["initial"] | None
GAPS = (1e1, 1e3, 1e5)
EPOCH = 100  # steps
METHODS: dict[str, tuple[Callable[[], Weighting | None], Scale]] = {
    "DWA": (DWA, None),
    "UncertaintyWeighting(lr=1e-3)": (functools.partial(UncertaintyWeighting, lr=1e-3), None),
    "IMTLL(lr=1e-3)": (functools.partial(IMTLL, lr=1e-3), None),
    "GradNorm(lr=1e-3)": (functools.partial(GradNorm, lr=1e-3), None),
    "UncertaintyWeighting": (UncertaintyWeighting, None),
    "IMTLL": (IMTLL, None),
    "GradNorm": (GradNorm, None),
    "FAMO": (FAMO, None),
    "ScaleInvariant": (ScaleInvariant, None),
    "NashMTL": (NashMTL, None),
    'loss_scale="initial"': (lambda: None, "initial"),
}


class Noise(IterableDataset[Any]):
    """An epoch of batches that nothing can be learned from."""

    def __iter__(self) -> Iterator[Any]:
        for _ in range(EPOCH):
            yield torch.randn(32, 8), {"small": torch.randn(32, 1), "large": torch.randn(32, 1)}


class Bridge(pl.Callback):
    """Stops the fit once the gap is bridged."""

    step: int | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        found = trainer.callback_metrics
        small, large = (found[f"weight/{task}"] * found[f"loss/{task}"] for task in ("small", "large"))
        if small >= large / 2:
            self.step = trainer.global_step
            trainer.should_stop = True


def steps_to_bridge(make: Callable[[], Weighting | None], scale: Scale, gap: float, most: int) -> int | None:
    """The steps that a method takes; None for more than ``most``."""

    def scaled(prediction: Tensor, target: Tensor) -> Tensor:
        return gap * mse_loss(prediction, target)

    torch.manual_seed(0)
    module = MultiTaskModule(
        nn.Sequential(nn.Linear(8, 32), nn.ReLU()),
        {task: nn.Linear(32, 1) for task in ("small", "large")},
        {"small": Task(mse_loss), "large": Task(scaled, loss_scale=scale)},
        optimizer=functools.partial(torch.optim.Adam, lr=1e-3),
    )
    weighting, bridge = make(), Bridge()
    trainer = pl.Trainer(
        max_steps=most,
        callbacks=[bridge, *([] if weighting is None else [weighting])],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Noise(), batch_size=None))
    return bridge.step


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=20_000, help="steps after which a fit ends")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="methods whose name holds every word")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there, too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    results = []
    print(f"{'steps until w_1 L_1 >= w_2 L_2 / 2':36}" + "".join(f"{gap:>12,.0f}" for gap in GAPS))
    for name, (make, scale) in METHODS.items():
        if all(word in name for word in options.only):
            steps = [steps_to_bridge(make, scale, gap, options.most) for gap in GAPS]
            results.append({"method": name, "gaps": list(GAPS), "steps": steps, "most": options.most})
            shown = (f"> {options.most:,}" if step is None else f"{step:,}" for step in steps)
            print(f"{name:36}" + "".join(f"{step:>12}" for step in shown), flush=True)
    if options.json:
        options.json.write_text(json.dumps({**environment(), "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
