"""Keeps scores of finished runs on disk under a digest of everything that a run depends on."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import DeviceStatsMonitor, LearningRateMonitor, ModelSummary, ProgressBar
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from lightning_mtl.module import MultiTaskModule
from lightning_mtl.monitors.base import Monitor

_LOOK_ON = (DeviceStatsMonitor, LearningRateMonitor, ModelSummary, Monitor, ProgressBar)
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def configuration(module: MultiTaskModule, trainer: pl.Trainer) -> dict[str, Any]:
    """Describe a module that is about to train and the Trainer's budget, as plain values.

    Included are the architecture as printed, the weights, hyperparameters, losses, metrics, the source of the module's
    classes, the optimizer and scheduler that were given as arguments, accumulation and clipping; the Trainer's epochs,
    steps, limits, precision, number of processes, and its callbacks with their attributes, but for those that only
    look. Not included are the data, code that those classes call, and global variables.

    Returns:
        Plain values, the same in every process.
    """
    return {
        "class": _name(type(module)),
        "code": _code(type(module)),
        "architecture": _printed(module),
        "weights": _digest_of_weights(module),
        "hyperparameters": _plain(dict(module.hparams)),
        "tasks": {name: [_function_name(task.loss), _printed(task.metrics)] for name, task in module.tasks.items()},
        "optimizer": _optimizer(module),
        "step": [
            module.accumulate_grad_batches,
            module.gradient_clip_val,
            module.gradient_clip_algorithm,
            module.max_skipped_steps,
            module.automatic_optimization,
        ],
        "trainer": _budget(trainer),
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
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    budget["callbacks"] = {
        _name(type(callback)): vars(callback) for callback in callbacks if not isinstance(callback, _LOOK_ON)
    }
    return {name: _plain(value) for name, value in budget.items()}


def _optimizer(module: MultiTaskModule) -> Any:  # noqa: ANN401 - plain values
    """The optimizer and scheduler given as arguments; those of a subclass are in its code."""
    if inspect.unwrap(type(module).configure_optimizers) is not inspect.unwrap(MultiTaskModule.configure_optimizers):
        return "configure_optimizers"
    parameters = list(module.parameters()) or [nn.Parameter(torch.zeros(1))]  # none before configure_model
    optimizer = module._make_optimizer(parameters)
    scheduler = None if module._make_scheduler is None else module._make_scheduler(optimizer)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    described = [_name(type(optimizer)), _plain(groups)]
    return described if scheduler is None else [*described, _name(type(scheduler)), _plain(scheduler.state_dict())]


def _digest_of_weights(module: nn.Module) -> str:
    found = hashlib.sha256()
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        found.update(f"{name} {value.dtype} {'lazy' if is_lazy(value) else tuple(value.shape)}".encode())
        if not is_lazy(value) and not isinstance(value, DTensor) and not value.is_meta:
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _code(cls: type[MultiTaskModule]) -> str:
    """The source of the classes below ``MultiTaskModule``, as far as there is a file of it."""
    found = hashlib.sha256()
    for own in cls.__mro__[: cls.__mro__.index(MultiTaskModule)]:
        found.update(_source(own).encode())
    return found.hexdigest()


def _source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # typed at a prompt
        return _name(cls)


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _function_name(function: Any) -> str:  # noqa: ANN401 - any callable
    if inspect.isfunction(function):
        return f"{function.__module__}.{function.__qualname__}"
    return _printed(function)


def _printed(value: Any) -> str:  # noqa: ANN401
    """How something prints, less the addresses of objects."""
    return _ADDRESS.sub("", repr(value))


def _plain(value: Any) -> Any:  # noqa: ANN401
    """The value with everything that JSON does not have printed."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(held) for held in value]
    if isinstance(value, set | frozenset):
        return sorted(map(_printed, value))
    return _printed(value)


Scores = dict[str, float]


class ScoreCache:
    """Keeps one JSON file for each finished run in a folder, named by the run's configuration.

    A file comes into being under its name at once, with all it holds: an interrupted run, or one that is killed while
    it writes, leaves none.

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

    def path(self, described: Mapping[str, Any]) -> Path:
        """Return the file of a configuration."""
        return self.folder / f"{digest(described)}.json"

    def read(self, described: Mapping[str, Any]) -> Scores | None:
        """Return the scores of the run with this configuration, or None.

        Raises:
            ValueError: If the file is damaged.
        """
        path = self.path(described)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return {str(metric): float(value) for metric, value in content["scores"].items()}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no file of scores ({error}); delete it to have the run repeated.") from error

    def write(self, described: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        """Write a run's scores together with the configuration, which is there for people to read."""
        content = json.dumps({"configuration": dict(described), "scores": dict(scores)}, indent=1, sort_keys=True)
        write_whole(self.path(described), content)


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
