"""The configuration that trials begin with, and the values that a trial puts into it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_mtl.configured import MultiTaskCLI
from lightning_mtl.configured.messages import ConfigurationError, in_one_line
from lightning_mtl.configured.names import choices
from lightning_mtl.method.base import Weighting
from lightning_mtl.task import Task
from lightning_mtl.tuning.space import Space, value_of_label


@dataclass(frozen=True)
class BaseConfig:
    """Holds the configuration that every trial begins with.

    Args:
        values: All of it, defaults included, as plain values.
        tasks: The module's tasks.
        world_size: On how many processes the Trainer trains.
    """

    values: Mapping[str, Any]
    tasks: Mapping[str, Task]
    world_size: int

    @property
    def seed(self) -> int:
        """Return the seed of the configuration, 0 where it has none."""
        found = self.values.get("seed_everything")
        return 0 if found is None or isinstance(found, bool) else int(found)

    def for_scores(self, seed: int, *left_out: type) -> dict[str, Any]:
        """Return a copy of the values with which a model trains for its scores alone, without these callbacks."""
        values = deepcopy(dict(self.values))
        values["seed_everything"] = seed
        values["trainer"].update(
            callbacks=other_callbacks(values, *left_out),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        return values

    def with_baselines(self, means: Mapping[str, Mapping[str, float]]) -> BaseConfig:
        """Add the scores of single-task models, from which ``val/delta_m`` follows."""
        values = deepcopy(dict(self.values))
        for task, scores in means.items():
            # 0 and what is not finite make no relative change.
            values["model"]["init_args"]["tasks"][task]["baseline"] = dict(scores)
        return BaseConfig(values, self.tasks, self.world_size)


def read_base(config: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> BaseConfig:
    """Read a configuration and make its objects once, so that mistakes show at once.

    Args:
        config: A file as ``lightning-mtl fit`` takes it, or its content.
        overrides: Further arguments, as on the command line.

    Raises:
        ConfigurationError: If it cannot be read, or a constructor refuses it.
    """
    given = deepcopy(dict(config)) if isinstance(config, Mapping) else ["--config", str(config), *overrides]
    cli = MultiTaskCLI(given, run=False, exit_on_error=False)
    values = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False, format="yaml"))
    # YAML's aliases are one object in several places, of which a trial may change one: JSON has no such thing.
    return BaseConfig(json.loads(json.dumps(values)), cli.model.tasks, cli.trainer.world_size)


def trial_configuration(base: BaseConfig, space: Space, drawn: Mapping[str, Any], *, seed: int) -> dict[str, Any]:
    """Return the configuration with a trial's values.

    Raises:
        ConfigurationError: If a path names no parameter.
    """
    values = deepcopy(dict(base.values))
    values["seed_everything"] = seed
    for path, allowed in space.parameters.items():
        _put(values, path, value_of_label(allowed, drawn[path]))
    if space.weightings:
        _put_weighting(values, space.candidate(drawn).method, space.weighting_arguments(drawn, list(base.tasks)))
    return values


def _put(values: dict[str, Any], path: str, value: Any) -> None:  # noqa: ANN401 - whatever YAML holds
    holder, key = locate(values, path)
    holder[key] = deepcopy(value)


def _put_weighting(values: dict[str, Any], method: type[Weighting], arguments: Mapping[str, Any]) -> None:
    entry = {"class_path": f"{method.__module__}.{method.__qualname__}", "init_args": arguments}
    values["trainer"]["callbacks"] = [*other_callbacks(values, Weighting), entry]


def other_callbacks(values: Mapping[str, Any], *left_out: type) -> list[dict[str, Any]]:
    """Return the Trainer's callbacks but for those of some classes."""
    callbacks = values["trainer"].get("callbacks") or []
    listed = callbacks if isinstance(callbacks, list) else [callbacks]
    return [callback for callback in listed if not issubclass(_imported_class(callback["class_path"]), left_out)]


def _imported_class(class_path: str) -> type:
    module, _, name = class_path.rpartition(".")
    found: type = getattr(importlib.import_module(module), name)
    return found


def locate(values: dict[str, Any], path: str, *, said: str = "parameters.") -> tuple[Any, Any]:
    """Find where a path leads: the mapping or list that holds the value, and its key there.

    ``init_args`` may be left out, items of lists go by their number.

    Args:
        values: The configuration.
        path: The path, its steps joined by dots.
        said: What the user wrote before the path, for errors.

    Raises:
        ConfigurationError: If it leads nowhere.

    Example:
        >>> values = {"model": {"class_path": "Net", "init_args": {"widths": [8, 16]}}}
        >>> locate(values, "model.widths.1")
        ([8, 16], 1)
    """
    holder: Any = None
    key: Any = None
    place: Any = values
    steps = path.split(".")
    for index, step in enumerate(steps):
        holder, key = place, step
        if isinstance(holder, dict) and step not in holder and isinstance(holder.get("init_args"), dict):
            holder = holder["init_args"]
        if isinstance(holder, list) and step.isdigit() and int(step) < len(holder):
            key = int(step)
        elif not (isinstance(holder, dict) and step in holder):
            raise ConfigurationError(said + _nowhere(path, ".".join(steps[:index]), step, holder))
        place = holder[key]
    return holder, key


def _nowhere(path: str, before: str, step: str, holder: Any) -> str:  # noqa: ANN401
    where = before or "the configuration"
    said = f"{path} names no parameter: {where} "
    if isinstance(holder, dict):
        return f"{said}has no {step!r}. {choices(step, [str(key) for key in holder])}"
    if isinstance(holder, list):
        return f"{said}is a list of {len(holder)}, its items are 0 to {len(holder) - 1}."
    return f"{said}is {holder!r}; give it as class_path and init_args in the configuration."


def check_space(base: BaseConfig, space: Space) -> None:
    """Refuse, before any trial, a path that leads nowhere and a value that its parameter does not take.

    Every choice and both ends of every range are parsed, and every weighting: several at a time, since what is wrong
    is named.

    Raises:
        ConfigurationError: If something is refused.
    """
    listed = [[(path, value) for value in allowed.examples()] for path, allowed in space.parameters.items()]
    for path in space.parameters:
        locate(deepcopy(dict(base.values)), path)
    parser = MultiTaskCLI(deepcopy(dict(base.values)), run=False, exit_on_error=False).parser
    for number in range(max([len(space.weightings), *map(len, listed)])):
        values = deepcopy(dict(base.values))
        for options in listed:
            _put(values, *options[number % len(options)])
        if space.weightings:
            chosen = space.weightings[number % len(space.weightings)]
            arguments = {**chosen.fixed, **{name: allowed.examples()[0] for name, allowed in chosen.space.items()}}
            _put_weighting(values, chosen.method, arguments)
        with in_one_line():
            parser.parse_object(values)
