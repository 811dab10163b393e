"""Makes modules, data and Trainers from configurations, and reports what cannot be read in one clear line."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_mtl.balanced import BalancedModule

ROOMS = ("weighting", "architectures", "monitors", "learning_rates", "data", "finetuning")


def load_short_names() -> dict[str, str]:
    """Import everything that the package exports, so that jsonargparse finds a class by its name alone.

    Returns:
        Each name and its class path, sorted.

    Example:
        >>> load_short_names()["MGDA"]
        'lightning_mtl.weighting.MGDA'
    """
    names = {}
    for room in ROOMS:
        path = f"lightning_mtl.{room}"
        for name in importlib.import_module(path).__all__:
            names[name] = f"{path}.{name}"
    return dict(sorted(names.items()))


PROGRAM = "lightning-mtl"
# Whose names are meant where a key ends so; elsewhere it is the package's.
MODULES = {"optimizer": "torch.optim", "lr_scheduler": "torch.optim.lr_scheduler"}
KEY = re.compile(r'Parser key "([^"]+)"')
CLASS_PATH = re.compile(r"Problem with given class_path '([^']+)'")
# Lines of jsonargparse's messages that do not name the mistake: they announce it, or repeat what was given.
NOISE = re.compile(
    r"Does not validate against|Subtypes:|Errors:|Expected a <class 'NoneType'>|Given value|Expected a path but|"
    r"Type .* expects a function or a callable class:|"
    r"Problem with given class_path '[^']+':$|Parser key \"[^\"]+\":$"
)
UNTYPED = re.compile(r"Expected '(?P<path>[\w.]+)' to be a function that returns <class '(?P<returned>\w+)'>")
UNKNOWN_NAME = re.compile(
    r"Expected a dot import path string: (?P<bare>\S+)|"
    r"module '(?P<module>[\w.]+)' has no attribute '(?P<attribute>\w+)'|"
    r"(?P<missing>No module named '[^']+')"
)


# Names that Lightning looks for itself, beside addresses and those of its registry of models.
LIGHTNINGS_OWN = ("last", "hpc")


class ConfigurationError(ValueError):
    """Is raised for a mistake in a configuration, a space or a storage, with a message of one line.

    Example:
        >>> raise ConfigurationError("objective is missing; name a metric to improve.")
        Traceback (most recent call last):
        lightning_mtl.configured.ConfigurationError: objective is missing; name a metric to improve.
    """


class OneLineParser(LightningArgumentParser):
    """Parses arguments; a mistake ends with one line and exit code 2, or raises where ``exit_on_error`` is False."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the condensed message, and end the process."""
        if ex is not None and debugging():
            raise ex
        if not self.exit_on_error:
            raise ArgumentError(None, message) from ex
        leave(condense(message))


@contextmanager
def in_one_line() -> Iterator[None]:
    """Raise what a parser that does not exit refuses as a :class:`ConfigurationError`."""
    try:
        yield
    except ArgumentError as error:
        raise ConfigurationError(condense(error.message)) from error


def leave(line: str) -> NoReturn:
    """Print what is wrong and end the process with exit code 2."""
    sys.stderr.write(f"{PROGRAM}: error: {line}\n")
    sys.exit(2)


def debugging() -> bool:
    """Return whether the user wants tracebacks, by the variable that jsonargparse reads."""
    return os.environ.get("JSONARGPARSE_DEBUG", "").lower() not in ("", "0", "false", "no")


def condense(message: str) -> str:
    r"""Put the key, the innermost reason and, for an unknown name, the choices on one line.

    Example:
        >>> condense('Parser key "model":\n  Errors:\n  - Parser key "lr":\n    Expected a <class \'int\'>. Got x')
        "model.lr: Expected a <class 'int'>. Got x"
    """
    lines = [line.strip().removeprefix("- ").strip() for line in message.splitlines()]
    reasons = list(dict.fromkeys(line for line in lines if line and not NOISE.match(line)))
    if (untyped := UNTYPED.search(message)) is not None:  # the other types that were tried tell nothing
        name, returned = untyped["path"].rpartition(".")[2], untyped["returned"]
        reasons = [f"{untyped[0]}; annotate what it returns: def {name}() -> {returned}"]
    # Nested keys as one; a message that tries several types names each of them more than once.
    key = ".".join(dict.fromkeys(KEY.findall(message))) or None
    reason = "; ".join(_with_choices(reason, key) for reason in reasons[:2]) or " ".join(message.split())
    # YAML's own messages run over several lines.
    if key is None and len(reasons) > 2:
        reason = " ".join(reasons)
    inside = CLASS_PATH.findall(message)
    where = f" (in {inside[-1]})" if inside and inside[-1].rpartition(".")[2] not in reason else ""
    return f"{key}: {KEY.sub('', reason).lstrip(': ')}{where}" if key else reason


def _with_choices(reason: str, key: str | None) -> str:
    found = UNKNOWN_NAME.search(reason)
    if found is None:
        return reason
    if found["bare"]:
        name, module = found["bare"], MODULES.get((key or "").rpartition(".")[2])
        known = _public(module) if module else list(load_short_names())
        return f"{name!r} is no class path, and no name of {module or 'this package'}. {choices(name, known)}"
    if found["attribute"]:
        return f"{reason}. {choices(found['attribute'], _public(found['module']))}"
    return f"{reason}; install it, or run in the folder where it lies"


def _public(module_name: str) -> list[str]:
    """The names that a module exports, or the classes and functions that it defines."""
    module: Any = importlib.import_module(module_name)
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if isinstance(getattr(module, name), type)]
    return [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module_name]


def choices(name: str, known: list[str]) -> str:
    """List the names there are, the ones most like a wrong name first.

    Example:
        >>> choices("losss", ["loss", "error"])
        'Did you mean loss? There are error, loss.'
    """
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    nearest = f"Did you mean {' or '.join(close)}? " if close else ""
    return f"{nearest}There are {', '.join(sorted(known))}."


PROGRAM_DESCRIPTION = """Multi-task learning with PyTorch Lightning, from YAML.

Besides the commands below: "lightning-mtl methods" prints the table of weighting methods, "lightning-mtl tune --help"
tells of searches over weightings and hyperparameters.
"""


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
            parser_kwargs={"prog": PROGRAM, "description": PROGRAM_DESCRIPTION, "exit_on_error": exit_on_error},
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
