"""Runs ``lightning-mtl tune``, a search from the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lightning_mtl.configured.messages import PROGRAM, ConfigurationError, debugging, leave
from lightning_mtl.tuning import tune
from lightning_mtl.tuning.addresses import without_passwords
from lightning_mtl.tuning.patience import StorageAwayError

TUNE_DESCRIPTION = """Search over weightings and hyperparameters with Optuna.

Start the same command as often as you like, on one machine or several: the workers share the study in the storage, and
stop when it has the trials asked for. A study that was interrupted goes on with the same command. What is not listed
below changes the configuration, as with "fit": --trainer.max_epochs 3.
"""


class OneLineArguments(argparse.ArgumentParser):
    """Parses arguments, and prints one line for a mistake."""

    def error(self, message: str) -> NoReturn:
        """Print the line, and end the process."""
        leave(without_passwords(message))


def parser() -> OneLineArguments:
    """Make the parser of the command's arguments."""
    made = OneLineArguments(
        prog=f"{PROGRAM} tune",
        description=TUNE_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--config", required=True, type=Path, help="what every trial begins with; a file as fit takes it")
    made.add_argument("--space", required=True, type=Path, help="what varies, and the objective")
    made.add_argument("--trials", required=True, type=int, help="how many trials the study has in the end")
    made.add_argument(
        "--storage",
        help="sqlite:///study.db or journal:///study.journal on one machine, postgresql://... or mysql://... across "
        "machines (default: this process's memory)",
    )
    made.add_argument("--name", default="search", help="the study's name in the storage (default: search)")
    made.add_argument("--dir", type=Path, help="where logs and results go (default: studies/NAME)")
    made.add_argument("--seeds", type=int, default=1, help="trainings a trial's value is the mean of (default: 1)")
    made.add_argument("--prune", action="store_true", help="end trials that are worse than the median after an epoch")
    made.add_argument("--timeout", type=float, help="begin no trial after so many seconds")
    made.add_argument(
        "--silence",
        type=int,
        default=60,
        help="seconds without a sign of life after which a worker is taken for dead (default: 60)",
    )
    made.add_argument(
        "--retry-running",
        action="store_true",
        help="repeat the trials that are running, of a journal file whose workers were killed",
    )
    return made


def search(arguments: Sequence[str]) -> None:
    """Search, and print what was found; leave with exit code 2 for a mistake, 1 if no trial has come to a value."""
    given, overrides = parser().parse_known_args(arguments)
    try:
        result = tune(
            given.config,
            given.space,
            trials=given.trials,
            storage=given.storage,
            name=given.name,
            folder=given.dir,
            seeds=given.seeds,
            prune=given.prune,
            timeout=given.timeout,
            silence=given.silence,
            retry_running=given.retry_running,
            overrides=overrides,
        )
    except (ConfigurationError, ImportError, StorageAwayError) as error:
        if debugging():
            raise
        leave(without_passwords(str(error)))
    except KeyboardInterrupt:
        sys.stderr.write(f"{PROGRAM}: interrupted; the same command goes on where the study is\n")
        sys.exit(130)  # as shells have it for Ctrl-C
    if result.leads:
        result.print_table()
    if result.leads and not result.finished and not result.unfinished:
        raise SystemExit(1)
