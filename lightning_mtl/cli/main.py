"""What ``lightning-mtl`` does with its arguments."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningCLI

from lightning_mtl.cli.method_table import print_methods
from lightning_mtl.cli.problems import PROGRAM, OneLineParser, debugging
from lightning_mtl.cli.short_names import load_short_names
from lightning_mtl.module import MultiTaskModule

DESCRIPTION = """Multi-task learning with PyTorch Lightning, from YAML.

Besides the commands below: "lightning-mtl methods" prints the table of weighting methods.
"""


class MultiTaskCLI(LightningCLI):
    """LightningCLI for a :class:`~lightning_mtl.MultiTaskModule`, or a subclass of it, and any data module.

    Everything in the package goes by its short name (``--trainer.callbacks+=MGDA``), all else by its class path. What
    cannot be read, or is refused by a constructor, ends with one line and exit code 2; with the environment variable
    ``JSONARGPARSE_DEBUG`` set, with the traceback.

    Args:
        args: Arguments, as on the command line or as a nested dict; None takes those of the process.
        run: Whether to run the subcommand that the arguments name; without, the objects are made and kept as
            ``cli.model``, ``cli.datamodule`` and ``cli.trainer``.

    Example:
        >>> cli = MultiTaskCLI(["--model.help", "MultiTaskModule"])  # doctest: +SKIP
    """

    def __init__(self, args: list[str] | dict[str, Any] | None = None, *, run: bool = True) -> None:
        load_short_names()
        super().__init__(
            MultiTaskModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            # A run that is resumed in its own folder writes the same file again.
            save_config_kwargs={"overwrite": True},
            parser_class=OneLineParser,
            parser_kwargs={"prog": PROGRAM, "description": DESCRIPTION},
            # The module has these as arguments: `--model.optimizer`, `--model.lr_scheduler`.
            auto_configure_optimizers=False,
            args=args,
            run=run,
        )

    def instantiate_classes(self) -> None:
        """Make the objects; what a constructor refuses is the user's to mend, in a line."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            if debugging():
                raise
            self.parser.error(str(error), error)


def main() -> None:
    """Run the command that the process's arguments name."""
    given = sys.argv[1:]
    # As with ``python -m``: a YAML file names classes of modules that lie beside it.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if given[:1] == ["methods"]:
        print_methods(given[1:])
    else:
        MultiTaskCLI()
