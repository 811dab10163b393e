"""Runs ``lightning-mtl tune``, a search from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_mtl.cli.worker_command import OneLineArguments, ending_in_one_line
from lightning_mtl.tuning import tune

TUNE_DESCRIPTION = """Search over weightings and hyperparameters with Optuna.

Start the same command as often as you like: the workers share the study, and stop when it has the trials asked for. A
study that was interrupted goes on with the same command. Across machines, give --storage an address. Another search
takes another --name. What is not listed below changes the configuration, as with "fit": --trainer.max_epochs 3.
"""


def parser() -> OneLineArguments:
    """Make the parser of the command's arguments."""
    made = OneLineArguments("tune", TUNE_DESCRIPTION)
    made.add_argument("--config", required=True, type=Path, help="what every trial begins with; a file as fit takes it")
    made.add_argument("--space", required=True, type=Path, help="what varies, and the objective")
    made.add_argument("--trials", required=True, type=int, help="how many trials the study has in the end")
    made.add_study(
        name="search",
        unit="trial",
        storage="an SQLite file in the folder",
        folder="where logs and results go (default: studies/NAME)",
    )
    made.add_argument("--seeds", type=int, default=1, help="trainings a trial's value is the mean of (default: 1)")
    made.add_argument("--prune", action="store_true", help="end trials that are worse than the median after an epoch")
    return made


def search(arguments: Sequence[str]) -> None:
    """Search, and print what was found; leave with exit code 2 for a mistake, 1 if no trial has come to a value."""
    command = parser()
    given, overrides = command.parse_known_args(arguments)
    with ending_in_one_line("study", command):
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
    if result.leads:
        result.print_table()
    if result.leads and not result.finished and not result.unfinished:
        raise SystemExit(1)
