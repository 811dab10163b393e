"""One clear line for what cannot be read, where jsonargparse has twenty."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lightning_mtl.configured.short_names import load_short_names

PROGRAM = "lightning-mtl"
# Whose names are meant where a key ends so; elsewhere it is the package's.
MODULES = {"optimizer": "torch.optim", "lr_scheduler": "torch.optim.lr_scheduler"}
KEY = re.compile(r'Parser key "([^"]+)"')
CLASS_PATH = re.compile(r"Problem with given class_path '([^']+)'")
# Lines that say that something is wrong, or repeat what was given, and not what is wrong.
NOISE = re.compile(
    r"Does not validate against|Subtypes:|Errors:|Expected a <class 'NoneType'>|Given value|Expected a path but|"
    r"Type .* expects a function or a callable class:|"
    r"Problem with given class_path '[^']+':$|Parser key \"[^\"]+\":$"
)
UNKNOWN_NAME = re.compile(
    r"Expected a dot import path string: (?P<bare>\S+)|"
    r"module '(?P<module>[\w.]+)' has no attribute '(?P<attribute>\w+)'|"
    r"(?P<missing>No module named '[^']+')"
)


class ConfigurationError(ValueError):
    """What a configuration, a space or a storage has wrong, in one line.

    Example:
        >>> raise ConfigurationError("objective is missing; name a metric to improve.")
        Traceback (most recent call last):
        lightning_mtl.configured.problems.ConfigurationError: objective is missing; name a metric to improve.
    """


class OneLineParser(LightningArgumentParser):
    """A parser that ends with one line and exit code 2, or raises where ``exit_on_error`` is False."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the condensed message, and leave."""
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
    """Whether the user wants tracebacks, by the variable that jsonargparse reads."""
    return os.environ.get("JSONARGPARSE_DEBUG", "").lower() not in ("", "0", "false", "no")


def condense(message: str) -> str:
    r"""Put the key, the innermost reason and, for an unknown name, the choices on one line.

    Example:
        >>> condense('Parser key "model":\n  Errors:\n  - Parser key "lr":\n    Expected a <class \'int\'>. Got x')
        "model.lr: Expected a <class 'int'>. Got x"
    """
    lines = [line.strip().removeprefix("- ").strip() for line in message.splitlines()]
    reasons = list(dict.fromkeys(line for line in lines if line and not NOISE.match(line)))
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
    """Say what a name may have been meant for, and which names there are.

    Example:
        >>> choices("losss", ["loss", "error"])
        'Did you mean loss? There are error, loss.'
    """
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    nearest = f"Did you mean {' or '.join(close)}? " if close else ""
    return f"{nearest}There are {', '.join(sorted(known))}."
