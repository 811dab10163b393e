"""What the commands whose workers share a study have in common: their arguments, and how they end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from lightning_mtl.configured.messages import PROGRAM, ConfigurationError, debugging, leave, with_nearest_option
from lightning_mtl.tuning.addresses import without_passwords
from lightning_mtl.tuning.patience import StorageAwayError


class OneLineArguments(argparse.ArgumentParser):
    """Parses the arguments of one command, and prints one line for a mistake."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            prog=f"{PROGRAM} {command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Print the line, and end the process."""
        leave(without_passwords(message))

    def add_study(self, *, name: str, unit: str, storage: str, folder: str) -> None:
        """Add the arguments that say where workers meet, and what becomes of those that died.

        Args:
            name: The study's default name.
            unit: What a worker does at a time: "trial".
            storage: Where they meet by default.
            folder: What ``--dir`` is.
        """
        self.add_argument(
            "--storage",
            help="where workers meet: sqlite:///study.db or journal:///study.journal on one machine, postgresql://... "
            f"or mysql://... across machines (default: {storage})",
        )
        self.add_argument("--name", default=name, help=f"the study's name in the storage (default: {name})")
        self.add_argument("--dir", type=Path, help=folder)
        self.add_argument("--timeout", type=float, help=f"begin no {unit} after so many seconds")
        self.add_argument(
            "--silence",
            type=int,
            default=60,
            help="seconds without a sign of life after which a worker is taken for dead (default: 60)",
        )
        self.add_argument(
            "--retry-running",
            action="store_true",
            help=f"repeat the {unit}s that are running, of a journal file whose workers were killed",
        )


@contextmanager
def ending_in_one_line(what: str, parser: argparse.ArgumentParser) -> Iterator[None]:
    """End the process with one line for a mistake (exit code 2), or where ``what`` is interrupted (130).

    An option that neither the command nor the configuration knows may be a misspelled one of the command's parser.
    """
    try:
        yield
    except (ConfigurationError, ImportError, StorageAwayError) as error:
        if debugging():
            raise
        leave(without_passwords(with_nearest_option(str(error), parser)))
    except KeyboardInterrupt:
        sys.stderr.write(f"{PROGRAM}: interrupted; the same command goes on where the {what} is\n")
        sys.exit(130)  # as shells have it for Ctrl-C
