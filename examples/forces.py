"""Fit a potential to energies and forces, over the ratio of their weights, and beside methods that find it.

    python examples/forces.py
    python examples/forces.py --data ethanol.xyz.gz --train 200

Forces are the derivative of the energy: one network, two losses, whose units make their ratio mean nothing. The sweep
trains with fixed weights from a hundredth to ten thousand before the energy's loss, the methods without a choice. Data
are six Morse atoms by default, or an extended XYZ file (``Properties=species:S:1:pos:R:3:forces:R:3``, ``energy=``).
The module to copy is ``Potential`` in ``potentials.py``. Ends with a table and a picture.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from lightning_mtl import Weighting
from lightning_mtl.monitors.figures import blank_figure
from lightning_mtl.weighting import GradientNormBalance, LRAnnealing, NashMTL, StaticWeights, UncertaintyWeighting
from potentials import Potential, Structures, morse_cluster, read_extended_xyz
from program import positive, quieten

RATIOS = (0.01, 0.1, 1.0, 10.0, 100.0, 1_000.0, 10_000.0)
BATCH = 16
METHODS: dict[str, Callable[[], Weighting]] = {
    "UncertaintyWeighting": UncertaintyWeighting,
    "GradientNormBalance": GradientNormBalance,
    "NashMTL": NashMTL,
    "LRAnnealing": lambda: LRAnnealing(main="forces", every_n_steps=10),
}
Errors = dict[str, float]


def fixed(ratio: float) -> Callable[[], Weighting]:
    return lambda: StaticWeights({"energy": ratio})


def fit(train: Structures, test: Structures, weighting: Weighting, options: argparse.Namespace) -> Errors:
    """Train one potential; its errors on geometries that it has not seen."""
    torch.manual_seed(options.seed)
    module = Potential(train, options.steps)
    drawn = RandomSampler(range(len(train)), replacement=True, num_samples=BATCH * options.steps)
    data = TensorDataset(train.positions, train.energies, train.forces)
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[weighting],
        accelerator="cpu",  # faster than a GPU for a network of this size
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=BATCH, sampler=drawn))
    return module.errors(test)


def load(options: argparse.Namespace) -> tuple[Structures, Structures]:
    """Training and test geometries."""
    if options.data is None:
        whole = morse_cluster(options.train + 400, options.seed)
    else:
        whole = read_extended_xyz(options.data)
    if len(whole) <= options.train:
        raise ValueError(
            f"{options.data} holds {len(whole)} geometries: --train {options.train} leaves none to test on."
        )
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(options.seed))
    return whole.of(order[: options.train]), whole.of(order[options.train :])


def table(found: Mapping[str, Errors], data: Structures) -> Table:
    energy, length = data.units
    made = Table(title="Mean absolute errors on geometries that were not trained on")
    made.add_column("weights, energy : forces")
    made.add_column(f"energy, {energy}", justify="right")
    made.add_column(f"forces, {energy}/{length}", justify="right")
    for name, errors in found.items():
        made.add_row(
            name, f"{errors['energy']:.4g}", f"{errors['forces']:.4g}", end_section=name == f"{RATIOS[-1]:g} : 1"
        )
    return made


def draw(found: Mapping[str, Errors], data: Structures, path: Path) -> None:
    """Errors over the ratio of the weights, those of the methods as lines."""
    figure = blank_figure(11, 4.2)
    sweep = [found[f"{ratio:g} : 1"] for ratio in RATIOS]
    energy, length = data.units
    for axes, task, unit in zip(
        figure.subplots(1, 2), ("energy", "forces"), (energy, f"{energy}/{length}"), strict=True
    ):
        axes.plot(RATIOS, [errors[task] for errors in sweep], "ko-", label="fixed weights")
        for index, name in enumerate(METHODS):
            axes.axhline(found[name][task], color=f"C{index}", linestyle="--", label=name)
        axes.set(xscale="log", yscale="log", xlabel="weight of the energy, that of the forces being 1")
        axes.set(ylabel=f"mean absolute error, {unit}", title=task)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=110)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FILE", help="an extended XYZ file, gzipped or not")
    parser.add_argument("--train", type=positive, default=100, help="geometries to train on")
    parser.add_argument("--steps", type=positive, default=1500, help="of each training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("forces.png"), help="where to draw")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Errors]:
    options, console = parse(arguments), Console()
    quieten()
    # What this is about; Lightning's users see it once.
    warnings.filterwarnings("ignore", "In the first step the loss of task")
    torch.set_num_threads(1)  # the network is too small to share
    try:
        train, test = load(options)
    except (OSError, ValueError) as error:
        raise SystemExit(f"forces.py: {error}") from error
    rows = {**{f"{ratio:g} : 1": fixed(ratio) for ratio in RATIOS}, **METHODS}
    found = {
        name: fit(train, test, make(), options)
        for name, make in track(rows.items(), description="training", console=console, transient=True)
    }
    console.print(table(found, train))
    draw(found, train, options.picture)
    console.print(f"Errors over the ratio: {options.picture}", highlight=False, soft_wrap=True)
    return found


if __name__ == "__main__":
    main()
