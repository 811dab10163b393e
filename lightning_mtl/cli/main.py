"""What ``lightning-mtl`` does with its arguments."""

from __future__ import annotations

import sys
from pathlib import Path

from lightning_mtl.cli.method_table import print_methods
from lightning_mtl.cli.search import search
from lightning_mtl.configured import MultiTaskCLI


def main() -> None:
    """Run the command that the process's arguments name."""
    given = sys.argv[1:]
    # As with ``python -m``: a YAML file names classes of modules that lie beside it.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if given[:1] == ["methods"]:
        print_methods(given[1:])
    elif given[:1] == ["tune"]:
        search(given[1:])
    else:
        MultiTaskCLI()
