"""Makes modules, data and Trainers from configurations, and reports what cannot be read in one clear line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_mtl.balanced import BalancedModule
from lightning_mtl.configured.messages import PROGRAM, ConfigurationError, OneLineParser, debugging, in_one_line
from lightning_mtl.configured.names import load_short_names

__all__ = ["ConfigurationError", "MultiTaskCLI"]

PROGRAM_DESCRIPTION = "Multi-task learning with PyTorch Lightning, from YAML."
# Names that Lightning looks for itself, beside addresses and those of its registry of models.
LIGHTNINGS_OWN = ("last", "hpc")


class MultiTaskCLI(LightningCLI):
    """Runs LightningCLI for a :class:`~lightning_mtl.BalancedModule`, of trunk and heads or not, and any data module.

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
            BalancedModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            # A run that is resumed in its own folder writes the same file again.
            save_config_kwargs={"overwrite": True},
            parser_class=OneLineParser,
            parser_kwargs={
                "prog": PROGRAM,
                "description": PROGRAM_DESCRIPTION,
                "exit_on_error": exit_on_error,
                "allow_abbrev": False,
            },
            # The module has these as arguments: `--model.optimizer`, `--model.lr_scheduler`.
            auto_configure_optimizers=False,
            args=args,
            run=run,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:  # noqa: ANN401 - LightningCLI's
        """Read the given arguments; a dict is complete, so that those of the process do not count."""
        if args is None:
            super().parse_arguments(parser, args)
            return
        with in_one_line():
            self.config = parser.parse_object(args) if isinstance(args, Mapping) else parser.parse_args(args)

    def instantiate_classes(self) -> None:
        """Make the objects; report in one line what a constructor refuses, and a checkpoint that is not there."""
        self._check_checkpoint()
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ImportError, RuntimeError) as error:
            if debugging():
                raise
            with in_one_line():
                self.parser.error(str(error), error)

    def _check_checkpoint(self) -> None:
        found = None if self.subcommand is None else self.config[self.subcommand].get("ckpt_path")
        if found is None:
            return
        why = None
        if found == "best":
            why = "'best' is known to the process of a fit alone, and this command is another one"
        elif found not in LIGHTNINGS_OWN and "://" not in found and not found.startswith("registry"):
            why = None if Path(found).exists() else f"there is no file {found!r}"
        if why is not None:
            with in_one_line():
                self.parser.error(
                    f"{self.subcommand}.ckpt_path: {why}; give the file, such as "
                    "lightning_logs/version_0/checkpoints/last.ckpt."
                )
