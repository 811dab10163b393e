"""Mixtures of experts on a table: MMoE and PLE against one shared trunk and against a model for each task alone.

    python examples/experts.py                           # scikit-learn's diabetes patients
    python examples/experts.py --data-dir path/to/adult  # the census of UCI Adult, as in MMoE's paper

What to copy is ``trunks``, which makes each kind of trunk, and ``train``, where ``GateUsage`` shows what the gates do.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table as Printed
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAUROC

from census import Splits, Table, load_splits
from lightning_mtl import MultiTaskModule, Task
from lightning_mtl.architectures import PLE, MMoE
from lightning_mtl.metrics import delta_m
from lightning_mtl.monitors import GateUsage
from lightning_mtl.monitors.figures import heatmap
from lightning_mtl.monitors.gates import GateTable
from program import margin_of, next_folder, positive, quieten, spread

OUTPUTS = 16


def layer(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU())


def mlp(inputs: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, OUTPUTS), nn.ReLU())


def trunks(inputs: int, tasks: Sequence[str]) -> Mapping[str, Callable[[], nn.Module]]:
    """Each kind of trunk, of about the same number of parameters."""
    return {
        "hard sharing": lambda: mlp(inputs, 64),
        "MMoE": lambda: MMoE(lambda: mlp(inputs, 14), tasks, gate=inputs, num_experts=4),
        "PLE": lambda: PLE(
            [lambda: layer(inputs, 14), lambda: layer(14, OUTPUTS)],
            tasks,
            gates=[inputs, 14],
            task_experts=1,
            shared_experts=2,
        ),
    }


class Answers(MultiTaskModule):
    """A trunk and a yes-or-no question for each task."""

    def __init__(self, trunk: nn.Module, tasks: Sequence[str], learning_rate: float) -> None:
        auc = MetricCollection({"AUC": BinaryAUROC()})
        super().__init__(
            trunk,
            heads={task: nn.Linear(OUTPUTS, 1) for task in tasks},
            tasks={task: Task(binary_cross_entropy_with_logits, auc) for task in tasks},
        )
        self.learning_rate = learning_rate

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.01)


@dataclass(frozen=True)
class Result:
    """Each task's area under the ROC curve on the test table, the model's size, and what its gates did last."""

    auc: dict[str, float]
    parameters: int
    gates: dict[str, GateTable]


def train(make: Callable[[], nn.Module], splits: Splits, tasks: Sequence[str], seed: int, args: argparse.Namespace,
          log_to: Path | None) -> Result:  # fmt: skip
    """Train and test one model."""
    torch.manual_seed(seed)
    model = Answers(make(), tasks, args.learning_rate)
    usage = [GateUsage()] if hasattr(model.trunk, "gate_statistics") else []
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        callbacks=[*usage],
        logger=TensorBoardLogger(log_to.parent, name="", version=log_to.name) if log_to else False,
        log_every_n_steps=5,
        accelerator="cpu",  # faster than a GPU for a model of this size
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, only(splits.train, tasks).loader(args.batch_size, shuffle=True))
    (tested,) = trainer.test(model, only(splits.test, tasks).loader(8192), verbose=False)
    size = sum(parameter.numel() for parameter in model.parameters())
    return Result({k: 100 * tested[f"test/AUC/{k}"] for k in tasks}, size, usage[0].latest if usage else {})


def only(table: Table, tasks: Sequence[str]) -> Table:
    return Table(table.features, {task: table.labels[task] for task in tasks})


def train_all(args: argparse.Namespace, log_to: Path, console: Console) -> dict[str, list[Result]]:
    """Train every model with every seed; the single-task models of a seed make one result."""
    results: dict[str, list[Result]] = {}
    for seed in range(args.seed, args.seed + args.repeats):
        splits = load_splits(args.data_dir, seed=seed)
        makes = trunks(splits.train.features.shape[1], splits.tasks)
        for name, make in makes.items():
            # One seed is enough to look at; the others are there to tell a difference from noise.
            folder = log_to / name.replace(" ", "-") if seed == args.seed else None
            results.setdefault(name, []).append(train(make, splits, splits.tasks, seed, args, folder))
        single = [train(makes["hard sharing"], splits, [task], seed, args, None) for task in splits.tasks]
        auc = {task: value for result in single for task, value in result.auc.items()}
        results.setdefault("single-task", []).append(Result(auc, sum(result.parameters for result in single), {}))
        found = "  ".join(f"{name} {statistics.mean(runs[-1].auc.values()):.2f}" for name, runs in results.items())
        console.print(f"seed {seed}, mean AUC %:  {found}", soft_wrap=True)
    return results


def report(results: Mapping[str, Sequence[Result]], console: Console) -> None:
    """Print the table, and whether the differences in it mean anything."""
    single, hard = results["single-task"], results["hard sharing"]
    tasks = list(single[0].auc)
    table = Printed(title=f"Area under the ROC curve, test, {len(single)} seeds: mean ± standard deviation")
    for column in ("", "parameters", *(f"{task} %" for task in tasks), "Δm %"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, runs in results.items():
        changes = [
            delta_m(list(run.auc.values()), list(alone.auc.values()), [True] * len(tasks))
            for run, alone in zip(runs, single, strict=True)
        ]
        values = [spread([run.auc[task] for run in runs], ".2f") for task in tasks]
        table.add_row(name, f"{runs[0].parameters:,}", *values, "" if runs is single else spread(changes, "+.2f"))
    console.print("", table)
    console.print("Δm: mean change of the AUC from the single-task models; negative is better.")
    for name in ("MMoE", "PLE"):
        console.print(compare(name, results[name], "hard sharing", hard), soft_wrap=True)
        console.print(compare(name, results[name], "single-task models", single), soft_wrap=True)


def compare(name: str, found: Sequence[Result], other: str, baseline: Sequence[Result]) -> str:
    """Whether the mean AUC of two kinds of models, trained with the same seeds, differs beyond noise."""
    differences = [
        statistics.mean(after.auc.values()) - statistics.mean(before.auc.values())
        for after, before in zip(found, baseline, strict=True)
    ]
    says = f"{name} against {other}: {statistics.mean(differences):+.2f} points of AUC"
    if len(differences) < 2:
        return f"{says}; one seed cannot tell that from noise, --repeats 5 can."
    margin = margin_of(differences)
    verdict = "within noise" if abs(statistics.mean(differences)) <= margin else "beyond noise"
    return f"{says} ± {margin:.2f} (95 % interval over {len(differences)} seeds): {verdict}."


def draw(results: Mapping[str, Sequence[Result]], log_to: Path) -> list[Path]:
    """Save what the gates of the first seed's models did in the last epoch, a picture a table."""
    written = []
    for name, runs in results.items():
        for key, gates in runs[0].gates.items():
            figure = heatmap(
                gates.values,
                gates.rows,
                gates.columns,
                title=f"{name}: {key.replace('gates_', 'level ')}",
                limits=gates.limits,
                colors="viridis",
                row_label="task",
                column_label="expert",
            )
            written.append(log_to / f"{name}-{key}.png")
            figure.savefig(written[-1], dpi=120)
    return written


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Mixtures of experts on a table with two tasks.")
    parser.add_argument("--data-dir", type=Path, help="a folder with UCI Adult's adult.data.gz and adult.test.gz")
    parser.add_argument("--epochs", type=positive, help="default: 30; for Adult 8")
    parser.add_argument("--repeats", type=positive, help="seeds to repeat it all with; default: 8, for Adult 5")
    parser.add_argument("--seed", type=int, default=0, help="the first seed: split, weights and order")
    parser.add_argument("--logdir", type=Path, default=Path("lightning_logs"), help="default: lightning_logs")
    args = parser.parse_args(argv)
    args.epochs = args.epochs or (8 if args.data_dir else 30)
    args.repeats = args.repeats or (5 if args.data_dir else 8)
    args.batch_size, args.learning_rate = (512, 3e-3) if args.data_dir else (64, 3e-3)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    quieten()
    torch.set_num_threads(1)  # more threads would only wait for each other: the models are small
    console = Console(highlight=False)
    try:
        splits = load_splits(args.data_dir, seed=args.seed)
    except (OSError, ValueError) as error:
        raise SystemExit(f"experts.py: {error}") from error
    log_to = next_folder(args.logdir, splits.name)
    console.print(
        f"{splits.name}: {len(splits.train)} people to learn from, {len(splits.test)} to be tested on, "
        f"{splits.train.features.shape[1]} features, tasks {' and '.join(splits.tasks)}; {args.epochs} epochs a model",
        soft_wrap=True,
    )
    results = train_all(args, log_to, console)
    report(results, console)
    pictures = " ".join(str(path) for path in draw(results, log_to))
    console.print(f"\nWhat the gates did: {pictures}\nEpoch by epoch, in the tab Images:\n\n"
                  f"  tensorboard --logdir {log_to}", soft_wrap=True)  # fmt: skip


if __name__ == "__main__":
    main()
