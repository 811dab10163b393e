"""LightningCLI for multi-task modules, from the process's arguments or from a configuration at hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_mtl.configured.problems import PROGRAM, OneLineParser, debugging, in_one_line
from lightning_mtl.configured.short_names import load_short_names
from lightning_mtl.module import MultiTaskModule

DESCRIPTION = """Multi-task learning with PyTorch Lightning, from YAML.

Besides the commands below: "lightning-mtl methods" prints the table of weighting methods, "lightning-mtl tune --help"
tells of searches over weightings and hyperparameters.
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
        exit_on_error: Whether to leave the process; without, a mistake raises a
            :class:`~lightning_mtl.configured.ConfigurationError`.

    Example:
        >>> cli = MultiTaskCLI(["--model.help", "MultiTaskModule"])  # doctest: +SKIP
    """

    def __init__(
        self, args: list[str] | dict[str, Any] | None = None, *, run: bool = True, exit_on_error: bool = True
    ) -> None:
        load_short_names()
        super().__init__(
            MultiTaskModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            # A run that is resumed in its own folder writes the same file again.
            save_config_kwargs={"overwrite": True},
            parser_class=OneLineParser,
            parser_kwargs={"prog": PROGRAM, "description": DESCRIPTION, "exit_on_error": exit_on_error},
            # The module has these as arguments: `--model.optimizer`, `--model.lr_scheduler`.
            auto_configure_optimizers=False,
            args=args,
            run=run,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:  # noqa: ANN401 - LightningCLI's
        """Read what was given; a dict is complete, whatever the process was started with."""
        if args is None:
            super().parse_arguments(parser, args)
            return
        with in_one_line():
            self.config = parser.parse_object(args) if isinstance(args, Mapping) else parser.parse_args(args)

    def instantiate_classes(self) -> None:
        """Make the objects; what a constructor refuses is the user's to mend, in a line."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            if debugging():
                raise
            with in_one_line():
                self.parser.error(str(error), error)
