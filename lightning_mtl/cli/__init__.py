"""The command line, ``lightning-mtl``: training from YAML, the table of methods, and searches."""

from lightning_mtl.cli.main import main

__all__ = ["main"]
