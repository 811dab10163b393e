"""The command line, ``lightning-mtl``: training from YAML, the table of methods, and searches."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

# What a command imports beyond the package's own dependencies, the extra that brings it, and what pip installs it by.
NEEDED = {
    "tune": ("tune", ("jsonargparse", "rich", "optuna", "matplotlib")),
    "methods": ("cli", ("rich",)),
}
NEEDED_BY_THE_REST = ("cli", ("jsonargparse",))
PACKAGES = {"jsonargparse": "'jsonargparse[signatures]'"}  # where it is not the module's name


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
        packages = " ".join(PACKAGES.get(module, module) for module in missing)
        sys.stderr.write(
            f"lightning-mtl: error: {', '.join(missing)} is not installed; run pip install {packages}, as the extra "
            f"{extra} of this package does.\n"
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
    else:
        from lightning_mtl.configured import MultiTaskCLI

        MultiTaskCLI()


def _is_installed(module: str) -> bool:
    # What is imported already may have no spec to be found by.
    return module in sys.modules or importlib.util.find_spec(module) is not None
