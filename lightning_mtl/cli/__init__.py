"""The command line, ``lightning-mtl``: training from YAML, the table of methods, searches and comparisons."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn


@dataclass(frozen=True)
class Command:
    """Holds one command.

    Args:
        summary: What it does, for the list of commands.
        run: Called with the arguments that follow its name.
        extra: The package's extra that brings what it imports.
        modules: What it imports beyond the package's own dependencies.
    """

    summary: str
    run: Callable[[Sequence[str]], None]
    extra: str
    modules: tuple[str, ...]


# Imported in the functions: each command needs an extra of its own, and the others shall not wait for it.


def _lightning(arguments: Sequence[str]) -> None:
    """Run one of Lightning's commands, which reads the process's arguments itself."""
    del arguments
    from lightning_mtl.configured import MultiTaskCLI
    from lightning_mtl.configured.messages import debugging, in_a_line, is_a_users_mistake, leave

    try:
        MultiTaskCLI()
    except Exception as error:
        if debugging() or not is_a_users_mistake(error):
            raise
        leave(in_a_line(error))


def _tune(arguments: Sequence[str]) -> None:
    from lightning_mtl.cli.tune_command import search

    search(arguments)


def _compare(arguments: Sequence[str]) -> None:
    from lightning_mtl.cli.compare_command import run

    run(arguments)


def _methods(arguments: Sequence[str]) -> None:
    from lightning_mtl.cli.method_table import print_methods

    print_methods(arguments)


# A new command is a line here, and a file beside this one.
COMMANDS = {
    "fit": Command("train, and validate on the way", _lightning, "cli", ("jsonargparse",)),
    "validate": Command("evaluate on the validation data", _lightning, "cli", ("jsonargparse",)),
    "test": Command("evaluate on the test data", _lightning, "cli", ("jsonargparse",)),
    "predict": Command("predict with a trained model", _lightning, "cli", ("jsonargparse",)),
    "tune": Command(
        "search over weightings and hyperparameters",
        _tune,
        "tune",
        ("jsonargparse", "rich", "optuna", "matplotlib"),
    ),
    "compare": Command(
        "compare weightings with equal weights and single tasks",
        _compare,
        "tune",
        ("jsonargparse", "rich", "optuna", "matplotlib"),
    ),
    "methods": Command("print the table of weightings", _methods, "cli", ("rich",)),
}


PACKAGES = {"jsonargparse": "'jsonargparse[signatures]'"}  # what pip installs, where it is not the module's name


def help_text() -> str:
    """List all commands, one a line.

    Example:
        >>> print(help_text().splitlines()[0])
        usage: lightning-mtl COMMAND [arguments]
    """
    width = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name.ljust(width)}  {command.summary}" for name, command in COMMANDS.items())
    return f"""usage: lightning-mtl COMMAND [arguments]

Multi-task learning with PyTorch Lightning, from YAML.

{listed}

  lightning-mtl COMMAND --help             what a command takes
  lightning-mtl fit --model.help NAME      the arguments of a class, likewise --trainer.callbacks.help GradNorm
  lightning-mtl --version                  the versions of the package, torch and Lightning

A mistake ends in one line and exit code 2; with JSONARGPARSE_DEBUG=1, in the traceback.
"""


def version_text() -> str:
    """Name the versions of the package and of what it stands on."""
    import lightning
    import torch

    from lightning_mtl import __version__

    return f"lightning-mtl {__version__} (torch {torch.__version__}, lightning {lightning.__version__})\n"


def main() -> None:
    """Run the command that the process's arguments name; leave with exit code 2 for a mistake.

    Example:
        >>> sys.argv = ["lightning-mtl", "methods"]  # doctest: +SKIP
        >>> main()  # doctest: +SKIP
    """
    given = sys.argv[1:]
    name = given[0] if given else ""
    if name in ("", "-h", "--help"):
        (sys.stdout if name else sys.stderr).write(help_text())
        sys.exit(0 if name else 2)
    if name == "--version":
        sys.stdout.write(version_text())
        sys.exit(0)
    # Options before the command, such as --config, are Lightning's.
    command = COMMANDS["fit"] if name.startswith("-") else COMMANDS.get(name)
    if command is None:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        _leave(f"there is no command {name!r}; {meant}The commands are {', '.join(COMMANDS)}.")
    if missing := [module for module in command.modules if not _is_installed(module)]:
        packages = " ".join(PACKAGES.get(module, module) for module in missing)
        _leave(
            f"{', '.join(missing)} is not installed; run pip install {packages}, as the extra {command.extra} of this "
            "package does."
        )
    # As with ``python -m``: a YAML file names classes of modules that lie beside it.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    command.run(given[1:])


def _leave(line: str) -> NoReturn:
    sys.stderr.write(f"lightning-mtl: error: {line}\n")
    sys.exit(2)


def _is_installed(module: str) -> bool:
    # What is imported already may have no spec to be found by.
    return module in sys.modules or importlib.util.find_spec(module) is not None
