"""Every method on the toy problem of CAGrad, Nash-MTL and FAMO: who reaches the Pareto front, and where on it.

    python -m benchmarks.toy_pareto                        # from (9, 9), which tells methods apart, and (0, 0)
    python -m benchmarks.toy_pareto --full --plots FOLDER  # from all five starts, with a picture for each method

50,000 steps of Adam with step size 1e-3 in float64. Methods have their defaults, but for FairGrad, whose default is
Nash-MTL, for STCH, which skips its warm-up, and for LBTW, whose reference is the first step; FAMO runs twice, with its
default gamma and with 0, which is what its authors set for this problem. A light loop over the package's own ``weigh``,
``combine`` and ``update``, with gradients by formula; the Trainer runs one method for some steps, to show that the two
agree. A point within ``TOLERANCE`` of the front counts as on it. Methods see the losses less their lower bounds, -2 and
-20 (FAMO's code has -2.1 and -21): some take logarithms, and no gradient changes by that. Those that count epochs get
one of ``EPOCH`` steps. DTP, which needs a metric, and PIVRG, which needs validation, are left out; those for auxiliary
tasks have L1 for the main one. The seconds depend on the machine, all else does not.
"""

# ruff: noqa: E402 - the number of threads has to be set before NumPy and torch are imported, which read it once.

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import argparse
import functools
import json
import logging
import math
import platform
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import lightning.pytorch as pl
import torch

from benchmarks import toy_problem
from benchmarks.toy_problem import LOWER_BOUNDS, STARTS, TASKS, distance_to_front, evaluate
from lightning_mtl import Weighting, __version__
from lightning_mtl import weighting as methods
from lightning_mtl.method.aggregator import Aggregator
from lightning_mtl.method.signals import Signals

TOLERANCE = 0.1
EPOCH = 100
LEARNING_RATE = 1e-3
KEPT_EVERY = 25  # steps between the points of a picture's trajectories
METHODS: dict[str, Callable[[], Weighting]] = {
    "equal weights": methods.StaticWeights,
    "RLW": methods.RLW,
    "GLS": methods.GLS,
    "ScaleInvariant": methods.ScaleInvariant,
    "DWA": methods.DWA,
    "LBTW": functools.partial(methods.LBTW, reference="training"),
    "CoVWeighting": methods.CoVWeighting,
    "UncertaintyWeighting": methods.UncertaintyWeighting,
    "IMTLL": methods.IMTLL,
    "STCH": functools.partial(methods.STCH, warmup_epochs=0),
    "FAMO": methods.FAMO,
    "FAMO(gamma=0)": functools.partial(methods.FAMO, gamma=0.0),
    "GradNorm": methods.GradNorm,
    "GradientNormBalance": methods.GradientNormBalance,
    "MGDA": methods.MGDA,
    "CRMOGM(MGDA)": lambda: methods.CRMOGM(methods.MGDA()),
    "CAGrad": methods.CAGrad,
    "PCGrad": methods.PCGrad,
    "GradVac": methods.GradVac,
    "GradDrop": methods.GradDrop,
    "IMTLG": methods.IMTLG,
    "IMTL": methods.IMTL,
    "NashMTL": methods.NashMTL,
    "FairGrad": functools.partial(methods.FairGrad, alpha=2.0),  # with 1, the default, it is Nash-MTL
    "AlignedMTL": methods.AlignedMTL,
    "UPGrad": methods.UPGrad,
    "DualProj": methods.DualProj,
    "ConFIG": methods.ConFIG,
    "SoftOptimalUncertainty": methods.SoftOptimalUncertainty,
    "IGB": methods.IGB,
    "DBMTL": methods.DBMTL,
    "SDMGrad": methods.SDMGrad,
    "ExcessMTL": methods.ExcessMTL,
    "MetaBalance(L1)": functools.partial(methods.MetaBalance, TASKS[0]),
    "AuxiliaryCosine(L1)": functools.partial(methods.AuxiliaryCosine, TASKS[0]),
    "Frozen(NashMTL)": lambda: methods.Frozen(methods.NashMTL()),
}
LEAST_SUM = -5.727  # x1 of the least L1 + L2: (7 * 0.1 - 7) / 1.1
Rows = Sequence[dict[str, Any]]


def ends(rows: Rows) -> list[float]:
    return [row["x"][0] for row in rows if row["reached"]]


def all_reach(rows: Rows) -> bool:
    return len(ends(rows)) == len(rows)


def spread(rows: Rows) -> bool:
    return all_reach(rows) and max(ends(rows)) - min(ends(rows)) > 1


def dominated(rows: Rows) -> bool:
    return bool(ends(rows)) and max(ends(rows)) < -5


def balanced(rows: Rows) -> bool:
    return all_reach(rows) and max(map(abs, ends(rows))) <= 5


# Method, whose claim (from its figures; CAGrad's have L1 unscaled), the claim, and whether the outcomes bear it out.
CLAIMS: list[tuple[str, str, Callable[[Rows], bool]]] = [
    ("equal weights", "CAGrad, FAMO: gets stuck from some start", lambda rows: not all_reach(rows)),
    ("MGDA", "CAGrad: the front, where depends on the start", spread),
    ("PCGrad", "CAGrad: the front, where depends on the start", spread),
    ("PCGrad", "Nash-MTL: L2 dominates, x1 below -5 where it ends on the front", dominated),
    (
        "CAGrad",
        "CAGrad: the least L1 + L2 from every start",
        lambda rows: all_reach(rows) and max(abs(x - LEAST_SUM) for x in ends(rows)) < 0.1,
    ),
    ("CAGrad", "Nash-MTL: L2 dominates, x1 below -5 where it ends on the front", dominated),
    ("NashMTL", "Nash-MTL: the front from every start, balanced (x1 within 5)", balanced),
    ("FAMO(gamma=0)", "FAMO: the front from every start", all_reach),
    ("FAMO", "the same with the default gamma, which its code does not take here", all_reach),
]


@dataclass
class Run:
    """One method from one start: the point, Adam's moments, and the way so far."""

    x: tuple[float, float]
    mean: list[float] = field(default_factory=lambda: [0.0, 0.0])
    square: list[float] = field(default_factory=lambda: [0.0, 0.0])
    path: list[tuple[float, float]] = field(default_factory=list)

    def move(self, direction: Sequence[float], step: int) -> None:
        """Take Adam's step number ``step``, from 1."""
        moved = []
        for position, (x, d) in enumerate(zip(self.x, direction, strict=True)):
            self.mean[position] += 0.1 * (d - self.mean[position])
            self.square[position] += 0.001 * (d * d - self.square[position])
            root = math.sqrt(self.square[position] / (1 - 0.999**step)) + 1e-8
            moved.append(x - LEARNING_RATE * self.mean[position] / (1 - 0.9**step) / root)
        self.x = (moved[0], moved[1])


def shifted(losses: Iterable[float]) -> torch.Tensor:
    lowered = [loss - bound for loss, bound in zip(losses, LOWER_BOUNDS, strict=True)]
    return torch.tensor(lowered, dtype=torch.float64)


@torch.no_grad()
def descend(weighting: Weighting, start: tuple[float, float], steps: int) -> Run:
    """What the module does with the method, for two parameters."""
    weighting.reset(TASKS)
    run = Run(start)
    losses, (a, b) = evaluate(*start)
    needs = weighting.measures
    for step in range(steps):
        if step % KEPT_EVERY == 0:
            run.path.append(run.x)
        extra: dict[str, Any] = {}
        if needs != "losses":
            square_a, product, square_b = a[0] ** 2 + a[1] ** 2, a[0] * b[0] + a[1] * b[1], b[0] ** 2 + b[1] ** 2
            if needs == "gramian":
                extra["gramian"] = torch.tensor([[square_a, product], [product, square_b]], dtype=torch.float64)
            else:
                extra["norms"] = torch.tensor([math.sqrt(square_a), math.sqrt(square_b)], dtype=torch.float64)
        values = shifted(losses)
        signals = Signals(TASKS, values, step, step // EPOCH, **extra)
        if needs == "rows" and not isinstance(weighting, Aggregator):
            rows = [torch.tensor([a, b], dtype=torch.float64)]
            u, v = weighting.decide(signals, (0, 1), measured=True, rows=rows).weights.tolist()
            direction = [u * a[0] + v * b[0], u * a[1] + v * b[1]]
        elif isinstance(weighting, Aggregator):
            direction = weighting.combine(signals, torch.tensor([a, b], dtype=torch.float64)).tolist()
        else:
            u, v = weighting.weigh(signals).tolist()
            direction = [u * a[0] + v * b[0], u * a[1] + v * b[1]]
        run.move(direction, step + 1)
        losses, (a, b) = evaluate(*run.x)
        if weighting.wants_losses_after:
            extra["losses_after"] = shifted(losses)
        weighting.update(Signals(TASKS, values, step, step // EPOCH, **extra))
    run.path.append(run.x)
    return run


def measure(name: str, start: tuple[float, float], steps: int) -> tuple[dict[str, Any], Run]:
    began = perf_counter()
    run = descend(METHODS[name](), start, steps)
    seconds = perf_counter() - began
    losses, _ = evaluate(*run.x)
    distance = distance_to_front(*run.x)
    return {
        "method": name,
        "start": list(start),
        "steps": steps,
        "reached": distance <= TOLERANCE,
        "distance": distance,
        "x": list(run.x),
        "losses": list(losses),
        "seconds": seconds,
    }, run


def show(row: dict[str, Any]) -> None:
    (s1, s2), (x1, x2), (l1, l2) = row["start"], row["x"], row["losses"]
    verdict = "front" if row["reached"] else f"no, {row['distance']:.2f} away"
    where = f"{row['method']:20} ({s1:4g}, {s2:4g})  {verdict:15} ({x1:7.3f}, {x2:7.3f})"
    print(f"{where}  {l1:7.3f}  {l2:7.3f}  {row['seconds']:5.1f} s", flush=True)


def compare_with_trainer(name: str, start: tuple[float, float], steps: int) -> dict[str, Any]:
    """Run a method through the Trainer, and take the largest difference from the light loop on the way's end."""
    module = toy_problem.toy_module(start, functools.partial(torch.optim.Adam, lr=LEARNING_RATE))
    batch = (torch.zeros(1, 1), {task: torch.zeros(1) for task in TASKS})
    trainer = pl.Trainer(
        max_steps=steps,
        precision="64-true",
        accelerator="cpu",
        callbacks=[METHODS[name]()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, torch.utils.data.DataLoader(cast("Any", [batch] * steps), batch_size=None))
    found = next(module.trunk.parameters()).tolist()
    expected = descend(METHODS[name](), start, steps).x
    difference = max(abs(one - other) for one, other in zip(found, expected, strict=True))
    return {"method": name, "start": list(start), "steps": steps, "x": found, "largest_difference": difference}


def close(results: Rows) -> None:
    """Say what the papers claim, beside what came out."""
    print("\nThe papers' claims, and x1 where a run ends on the front, - where it does not:")
    for name, claim, holds in CLAIMS:
        if rows := [row for row in results if row["method"] == name]:
            found = ", ".join(f"{row['x'][0]:.1f}" if row["reached"] else "-" for row in rows)
            print(f"  {name:13} {claim:66} {'agrees' if holds(rows) else 'DISAGREES'}: {found}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all five starts")
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="methods whose name holds one of them")
    parser.add_argument("--trainer", default="CAGrad", choices=METHODS, help="the method that the Trainer runs, too")
    parser.add_argument("--trainer-steps", type=int, default=300)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there, too")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write a picture for each method there")
    parser.add_argument("--png", type=Path, metavar="PATH", help="write all of them on one sheet there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    starts = STARTS if options.full else (STARTS[2], STARTS[1])
    results: list[dict[str, Any]] = []
    print(f"{'method':20} {'start':13} {'Pareto front':15} {'end':18}  {'L1':>7}  {'L2':>7}")
    runs: dict[str, dict[tuple[float, float], Run]] = {}
    for name in [name for name in METHODS if any(word in name for word in options.only)]:
        runs[name] = {}
        for start in starts:
            row, runs[name][start] = measure(name, start, options.steps)
            results.append(row)
            show(row)
    if options.plots or options.png:
        # Not at the top: only pictures need matplotlib.
        from benchmarks.toy_pictures import plot, plot_sheet

        if options.plots:
            plot(runs, options.plots)
        if options.png:
            plot_sheet(runs, options.png)
    agreement = compare_with_trainer(options.trainer, STARTS[2], options.trainer_steps)
    print(f"\n{agreement['method']}, {agreement['steps']} steps by the Trainer and by the light loop:")
    print(f"the largest difference is {agreement['largest_difference']:.1e}")
    close(results)
    if options.json:
        about = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": {"cores": os.cpu_count(), "system": platform.system()},
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "lightning_mtl": __version__},
        }
        options.json.write_text(json.dumps({**about, "trainer": agreement, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
