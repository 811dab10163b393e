"""Keeps scores of finished runs under a digest of everything that a run depends on, on disk or in this process."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, DeviceStatsMonitor, LearningRateMonitor, ModelSummary, ProgressBar
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_mtl.balanced import BalancedModule
from lightning_mtl.monitors.base import Monitor
from lightning_mtl.transfer.values import DIGITS, Digests, attributes, class_name, digest_of

LOOK_ON = (DeviceStatsMonitor, LearningRateMonitor, ModelSummary, Monitor, ProgressBar)
# Described as parts and weights.
CHILDREN = frozenset({"_modules", "_parameters", "_buffers"})
# What a fit begins anew, what others describe, and what is remembered to be quick.
OF_A_FIT = frozenset({"_trainer", "_fabric", "_penalized", "optimization", "recorder", "schedules", "sharing", "tasks"})


def configuration(module: BalancedModule, trainer: pl.Trainer) -> dict[str, Any]:
    """Describe a module that is about to train and the Trainer's budget, by value.

    Included are, for every part of the module, its class, its attributes and its weights; the losses, metrics and other
    arguments of the tasks; the code of functions and classes that no installed library brings; the optimizer and
    scheduler that were given as arguments; the Trainer's epochs, steps, limits, precision, number of processes, and its
    callbacks with their attributes, but for those that only look. Not included are the data, what code reads from files
    and modules, and the code of libraries.

    Returns:
        Plain values, the same in every process; objects by their class and a digest.
    """
    values = Digests()
    parts = {}
    for name, part in module.named_modules():
        own = {key: held for key, held in (attributes(part) or {}).items() if key not in CHILDREN}
        if part is module:
            own = {key: held for key, held in own.items() if key not in OF_A_FIT}
        parts[name] = f"{class_name(type(part))} {values.of((type(part), own))[:DIGITS]}"
    tasks = {name: replace(task, baseline=None) for name, task in module.tasks.items()}
    weights = [(name, value) for name, value in (*module.named_parameters(), *module.named_buffers())]
    return {
        "parts": parts,
        "tasks": {name: values.of(task)[:DIGITS] for name, task in tasks.items()},
        "weights": values.of(weights)[:DIGITS],
        "optimizer": _optimizer(module),
        "trainer": _budget(trainer),
        "code": values.of_code()[:DIGITS],
    }


def digest(described: Mapping[str, Any]) -> str:
    """Compute a name for a configuration, 20 hexadecimal digits.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}), digest({"a": 1}) == digest({"a": 2})
        (True, False)
    """
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:20]


def _budget(trainer: pl.Trainer) -> dict[str, Any]:
    budget = {
        name: getattr(trainer, name)
        for name in (
            "max_epochs",
            "min_epochs",
            "max_steps",
            "min_steps",
            "limit_train_batches",
            "limit_val_batches",
            "limit_test_batches",
            "overfit_batches",
            "accumulate_grad_batches",
            "gradient_clip_val",
            "gradient_clip_algorithm",
            "precision",
            "world_size",
            "check_val_every_n_epoch",
            "val_check_interval",
            "fast_dev_run",
        )
    }
    for name in ("strategy", "accelerator", "precision_plugin"):
        budget[name] = class_name(type(getattr(trainer, name)))
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    budget["callbacks"] = [_callback(callback) for callback in callbacks if not isinstance(callback, LOOK_ON)]
    return {name: _plain(value) for name, value in budget.items()}


def _callback(callback: pl.Callback) -> str:
    held = attributes(callback) or {}
    if isinstance(callback, Checkpoint):
        held = {key: value for key, value in held.items() if key not in ("dirpath", "_fs")}  # no score depends on it
    values = Digests(outer=False)
    return f"{class_name(type(callback))} {values.of((type(callback), held))[:DIGITS]} {values.of_code()[:DIGITS]}"


def _optimizer(module: BalancedModule) -> Any:  # noqa: ANN401 - plain values
    """The optimizer and scheduler given as arguments; those of a subclass are in its code and attributes."""
    if inspect.unwrap(type(module).configure_optimizers) is not inspect.unwrap(BalancedModule.configure_optimizers):
        return "configure_optimizers"
    parameters = list(module.parameters()) or [nn.Parameter(torch.zeros(1))]  # none before configure_model
    optimizer = module._make_optimizer(parameters)
    scheduler = None if module._make_scheduler is None else module._make_scheduler(optimizer)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    described = [class_name(type(optimizer)), _plain(groups)]
    return described if scheduler is None else [*described, class_name(type(scheduler)), _plain(scheduler.state_dict())]


def _plain(value: Any) -> Any:  # noqa: ANN401
    """The value with everything that JSON does not have as its class and digest."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(held) for held in value]
    return f"{class_name(type(value))} {digest_of(value)}"


Scores = dict[str, float]
EDITION = 2
# What the files of the first edition are called, whose digests were those of printed objects.
FIRST_EDITION = re.compile(r"[0-9a-f]{20}\.json")


class ScoreCache:
    """Keeps one JSON file for each finished run in a folder, named by the run's configuration.

    A file comes into being under its name at once, with all it holds: an interrupted run, or one that is killed while
    it writes, leaves none, and of several processes that write the same one, one has written it. Files of an earlier
    version of this package are left alone and not read, with a warning.

    Args:
        folder: Made when the first score is written. Processes on several machines must share it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = ScoreCache(folder)
        ...     cache.write({"task": "age", "seed": 0}, {"loss": 0.5})
        ...     cache.read({"task": "age", "seed": 0}), cache.read({"task": "age", "seed": 1})
        ({'loss': 0.5}, None)
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if old := sum(FIRST_EDITION.fullmatch(path.name) is not None for path in self.folder.glob("*.json")):
            rank_zero_warn(
                f"{self.folder} has {old} scores of an earlier version of this package, which are not read: they may "
                "belong to another configuration. The runs are repeated; the old files can be deleted."
            )

    def path(self, described: Mapping[str, Any]) -> Path:
        """Return the file of a configuration."""
        return self.folder / f"scores-{digest(described)}.json"

    def read(self, described: Mapping[str, Any]) -> Scores | None:
        """Return the scores of the run with this configuration, or None.

        Raises:
            ValueError: If the file is damaged.
        """
        path = self.path(described)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            scores = {str(metric): float(value) for metric, value in content["scores"].items()}
            return scores if content["edition"] == EDITION else None
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no file of scores ({error}); delete it to have the run repeated.") from error

    def write(self, described: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        """Write a run's scores together with the configuration, which is there for people to read."""
        content = {"edition": EDITION, "configuration": dict(described), "scores": dict(scores)}
        write_whole(self.path(described), json.dumps(content, indent=1, sort_keys=True))


class CallMemory:
    """Keeps the scores of one call's finished runs in this process, for the same call after it was interrupted.

    Args:
        arguments: The call's objects. Others that are equal are not the same: what they read is not known to be.
    """

    interrupted: ClassVar[CallMemory | None] = None

    def __init__(self, arguments: Sequence[object]) -> None:
        self.arguments = tuple(arguments)
        self._scores: dict[str, Scores] = {}

    @classmethod
    @contextmanager
    def of_call(cls, arguments: Sequence[object]) -> Iterator[CallMemory]:
        """Go on with the memory of the call before, if it had these objects and did not come to its end."""
        before, cls.interrupted = cls.interrupted, None
        same = before is not None and len(before.arguments) == len(arguments)
        if before is None or not same or any(a is not b for a, b in zip(before.arguments, arguments, strict=True)):
            before = cls(arguments)
        try:
            yield before
        except BaseException:
            cls.interrupted = before
            raise

    def read(self, described: Mapping[str, Any]) -> Scores | None:
        """Return the scores of the run with this configuration, or None."""
        return self._scores.get(digest(described))

    def write(self, described: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        """Keep a run's scores."""
        self._scores[digest(described)] = dict(scores)


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, also when interrupted or when others write the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"unfinished-{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
