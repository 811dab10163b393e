"""The command line, ``lightning-mtl``: training from YAML, the table of methods, and searches."""

from lightning_mtl.cli.main import main
from lightning_mtl.configured import MultiTaskCLI

__all__ = ["MultiTaskCLI", "main"]
