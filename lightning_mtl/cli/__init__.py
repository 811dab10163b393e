"""The command line, ``lightning-mtl``: training from YAML, the table of methods, searches and comparisons."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

# What a command imports beyond the package's own dependencies, and the extra that brings it.
NEEDED = {
    "tune": ("tune", ("jsonargparse", "rich", "optuna", "matplotlib")),
    "compare": ("tune", ("jsonargparse", "rich", "optuna", "matplotlib")),
    "methods": ("cli", ("rich",)),
}
NEEDED_BY_THE_REST = ("cli", ("jsonargparse",))


def main() -> None:
    """Run the command that the process's arguments name; leave with exit code 2 where an extra is not installed.

    Example:
        >>> sys.argv = ["lightning-mtl", "methods"]  # doctest: +SKIP
        >>> main()  # doctest: +SKIP
    """
    given = sys.argv[1:]
    command = given[0] if given else ""
    extra, modules = NEEDED.get(command, NEEDED_BY_THE_REST)
    if missing := [module for module in modules if not _is_installed(module)]:
        sys.stderr.write(
            f"lightning-mtl: error: {', '.join(missing)} is not installed; run pip install 'lightning-mtl[{extra}]'.\n"
        )
        sys.exit(2)
    # As with ``python -m``: a YAML file names classes of modules that lie beside it.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    # Imported here: each command needs an extra of its own, and the others shall not wait for it.
    if command == "methods":
        from lightning_mtl.cli.method_table import print_methods

        print_methods(given[1:])
    elif command == "tune":
        from lightning_mtl.cli.tune_command import search

        search(given[1:])
    elif command == "compare":
        from lightning_mtl.cli.compare_command import run

        run(given[1:])
    else:
        from lightning_mtl.configured import MultiTaskCLI

        MultiTaskCLI()


def _is_installed(module: str) -> bool:
    # What is imported already may have no spec to be found by.
    return module in sys.modules or importlib.util.find_spec(module) is not None
