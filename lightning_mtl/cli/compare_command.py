"""Runs ``lightning-mtl compare``, a comparison of methods from the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_mtl.cli.worker_command import OneLineArguments, ending_in_one_line
from lightning_mtl.tuning import compare
from lightning_mtl.tuning.comparing.rows import DEFAULT_METHODS, SHORT

COMPARE_DESCRIPTION = """Compare weighting methods on your own model and data, with the same care for all.

Single-task models, equal weights, standardized targets, 1 / L(0), the best of some fixed weights, and any methods
train with equal budgets, a learning rate of their own and the same seeds. A page says what differs and what does not.
The same command goes on where it was interrupted, and shares the work where it is started several times. What is not
listed below changes the configuration, as with "fit": --trainer.max_epochs 3.
"""


def parser() -> OneLineArguments:
    """Make the parser of the command's arguments."""
    made = OneLineArguments("compare", COMPARE_DESCRIPTION)
    made.add_argument("--config", required=True, type=Path, help="what every row begins with; a file as fit takes it")
    made.add_argument(
        "--methods",
        nargs="*",
        type=_method,
        default=list(DEFAULT_METHODS),
        metavar="METHOD",
        help="names, or '{class_path: MGDA, init_args: {at: features}}' (default: %(default)s)",
    )
    made.add_argument(
        "--rows",
        nargs="*",
        default=list(SHORT),
        metavar="ROW",
        help=f"the other rows: {', '.join(SHORT)} (default: all; equal weights are always there)",
    )
    made.add_argument("--seeds", type=int, default=5, help="how many seeds are compared (default: 5)")
    made.add_argument(
        "--lrs", type=float, nargs="+", metavar="LR", help="to choose from (default: three around the configuration's)"
    )
    made.add_argument("--lr-path", help="where the learning rate is in the configuration (default: model.optimizer.lr)")
    made.add_argument("--seed-path", help="where a seed goes besides seed_everything, such as data.seed")
    made.add_argument("--draws", type=int, default=4, help="sets of fixed weights to choose from (default: 4)")
    made.add_argument(
        "--metrics", nargs="+", metavar="METRIC", help="to compare (default: each task's own, or its loss)"
    )
    made.add_study(
        name="comparison",
        unit="training",
        storage="an SQLite file in the folder",
        folder="where table, picture and page go (default: the study's name)",
    )
    made.add_argument("--retry-failed", action="store_true", help="repeat the trainings that ended with an error")
    return made


def _method(text: str) -> Any:  # noqa: ANN401 - a name or a mapping
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no YAML: {' '.join(str(error).split())}") from error


def run(arguments: Sequence[str]) -> None:
    """Compare, and print what was found; leave with exit code 2 for a mistake."""
    command = parser()
    given, overrides = command.parse_known_args(arguments)
    with ending_in_one_line("comparison", command):
        result = compare(
            given.config,
            methods=given.methods,
            rows=given.rows,
            seeds=given.seeds,
            lrs=given.lrs,
            lr_path=given.lr_path,
            seed_path=given.seed_path,
            draws=given.draws,
            metrics=given.metrics,
            storage=given.storage,
            name=given.name,
            folder=given.dir,
            timeout=given.timeout,
            silence=given.silence,
            retry_running=given.retry_running,
            retry_failed=given.retry_failed,
            overrides=overrides,
        )
    result.print_table()
