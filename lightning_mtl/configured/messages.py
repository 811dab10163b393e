"""Reports what cannot be read, or is refused, in one clear line."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import sys
import traceback
from argparse import ArgumentError, ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

from lightning_mtl.configured.names import choices, nearest, public_names, unknown_name

PROGRAM = "lightning-mtl"
PACKAGE = Path(__file__).parent.parent
KEY = re.compile(r'Parser key "([^"]+)"')
CLASS_PATH = re.compile(r"Problem with given class_path '([^']+)'")
# Lines of jsonargparse's messages that do not name the mistake: they announce it, or repeat what was given.
NOISE = re.compile(
    r"Does not validate against|Subtypes:|Errors:|Expected a <class 'NoneType'>|Given value|Expected a path but|"
    r"Type .* expects a function or a callable class:$|"
    r"Not a valid subclass of|Subclass types expect|a class path \(str\)|a dict with|"
    r"Problem with given class_path '[^']+':$|Parser key \"[^\"]+\":$"
)
# What stands around a function's mistake on one line: the type that was expected, and the value once more.
CALLABLE = re.compile(r"Type .* expects a function or a callable class: (?P<mistake>.*?)(?:\. Got value: .*)?")
UNKNOWN_OPTION = re.compile(r"unrecognized arguments: --(?P<option>[\w.]+)")
TWICE = re.compile(r"more than one stateful callback of type `(?P<name>\w+)`")
NOT_ACCEPTED = re.compile(r"(?:does not accept option|Option) '(?P<option>[\w.]+)'")
UNTYPED = re.compile(r"Expected '(?P<path>[\w.]+)' to be a function that returns <class '(?P<returned>\w+)'>")
NAN_AS_WORD = re.compile(r"Given value: nan$", re.IGNORECASE | re.MULTILINE)
UNKNOWN_NAME = re.compile(
    r"Expected a dot import path string: (?P<bare>\S+)|"
    r"module '(?P<module>[\w.]+)' has no attribute '(?P<attribute>\w+)'|"
    r"(?P<missing>No module named '[^']+')"
)


class ConfigurationError(ValueError):
    """Is raised for a mistake in a configuration, a space or a storage, with a message of one line.

    Example:
        >>> raise ConfigurationError("objective is missing; name a metric to improve.")
        Traceback (most recent call last):
        lightning_mtl.configured.messages.ConfigurationError: objective is missing; name a metric to improve.
    """


class OneLineParser(LightningArgumentParser):
    """Parses arguments; a mistake ends with one line and exit code 2, or raises where ``exit_on_error`` is False."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the condensed message, and end the process."""
        if ex is not None and debugging():
            raise ex
        if not self.exit_on_error:
            raise ArgumentError(None, message) from ex
        leave(condense(with_nearest_option(message, self)))


def with_nearest_option(message: str, parser: ArgumentParser) -> str:
    """Add the nearest option to a message of argparse's about one that it does not know, unless one is named."""
    found = UNKNOWN_OPTION.search(message)
    if found is None or "did you mean" in message:
        return message
    options = [one.lstrip("-") for action in parser._actions for one in action.option_strings if one.startswith("--")]
    close = nearest(found["option"], options)
    return f"{message}{f'; did you mean --{close[0]}?' if close else ''}"


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
    if (twice := TWICE.search(message)) is not None:
        return f"trainer.callbacks: The Trainer holds two {twice['name']}; keep one of them."
    lines = [line.strip().removeprefix("- ").strip() for line in message.splitlines()]
    lines = [found["mistake"] if (found := CALLABLE.fullmatch(line)) else line for line in lines]
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
    if "<class 'float'>" in reason and NAN_AS_WORD.search(message):
        reason += "; YAML writes NaN as .nan"
    inside = CLASS_PATH.findall(message)
    reason += _nearest_argument(message, inside)
    where = f" (in {inside[-1]})" if inside and inside[-1].rpartition(".")[2] not in reason else ""
    return f"{key}: {KEY.sub('', reason).lstrip(': ')}{where}" if key else reason


def _nearest_argument(message: str, inside: list[str]) -> str:
    """The nearest argument of the class that refuses one, or of the Trainer; else the nearest part of a file."""
    found = NOT_ACCEPTED.search(message) or (UNKNOWN_OPTION.search(message) if inside else None)
    if found is None:
        return ""
    first, _, rest = found["option"].partition(".")
    prefix, wrong = ("trainer.", rest.partition(".")[0]) if first == "trainer" else ("", first)
    if first == "trainer" or inside:
        module, _, name = ("lightning.pytorch.Trainer" if first == "trainer" else inside[-1]).rpartition(".")
        known = list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    else:
        known = ["seed_everything", "trainer", "model", "data", "ckpt_path"]
    close = nearest(wrong, known)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _with_choices(reason: str, key: str | None) -> str:
    found = UNKNOWN_NAME.search(reason)
    if found is None:
        return reason
    if found["bare"]:
        return unknown_name(found["bare"], key)
    if found["attribute"]:
        return f"{reason}. {choices(found['attribute'], public_names(found['module']))}"
    return f"{reason}; install it, or run in the folder where it lies"


def is_a_users_mistake(error: BaseException) -> bool:
    """Return whether an error is a refusal: raised by a line of this package, or Lightning's for a wrong setting.

    Refusals say what to do, so that their line is enough; what another library or the user's code raises needs the
    traceback.
    """
    if isinstance(error, MisconfigurationException):
        return True
    if not isinstance(error, ValueError | TypeError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(PACKAGE)


def in_a_line(error: BaseException) -> str:
    """Write an error and its notes on one line."""
    return " ".join(" ".join([str(error), *getattr(error, "__notes__", [])]).split())
