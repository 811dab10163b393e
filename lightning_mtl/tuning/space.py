"""Reads what a search varies from a YAML file."""

from __future__ import annotations

import importlib
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lightning_mtl.configured.messages import ConfigurationError
from lightning_mtl.configured.names import choices, load_short_names
from lightning_mtl.method.base import Weighting
from lightning_mtl.method.search_space import Choice, Range
from lightning_mtl.tuning.goals import Goal, read_goals

if TYPE_CHECKING:
    import optuna

KEYS = ("objective", "weighting", "importance", "parameters")
WEIGHTING = "weighting"
# -log u of a uniform u is exponential, and exponentials divided by their sum are uniform on the simplex. Away from both
# ends, so that no weight is infinite and not all are 0.
UNIFORM = Range(1e-6, 1 - 1e-6)


@dataclass(frozen=True)
class Candidate:
    """Holds one of the weightings to choose from.

    Args:
        method: The class.
        fixed: Arguments that do not vary.
        space: Arguments that do, from the class's ``search_space`` or from the file.
    """

    method: type[Weighting]
    fixed: Mapping[str, Any]
    space: Mapping[str, Range | Choice]

    @property
    def name(self) -> str:
        """Return the class's name, which is its name in the search."""
        return self.method.__name__

    @property
    def importance_argument(self) -> str:
        """Return the constructor's argument that takes a factor for each task."""
        return "importance" if "importance" in inspect.signature(self.method).parameters else "weights"


@dataclass(frozen=True)
class Space:
    """Holds what a search varies, and what it improves.

    Args:
        goals: What is minimized or maximized; several make a Pareto front.
        weightings: The candidates; none leaves the configuration's weighting.
        simplex: Whether the tasks' importances, which sum to their number, are searched, too.
        parameters: Other parameters of the configuration, by path.
    """

    goals: tuple[Goal, ...]
    weightings: tuple[Candidate, ...]
    simplex: bool
    parameters: Mapping[str, Range | Choice]

    def sample(self, trial: optuna.Trial, tasks: Sequence[str]) -> dict[str, Any]:
        """Draw one point; the names are those of the study's parameters."""
        drawn = {name: _suggest(trial, name, allowed) for name, allowed in self.parameters.items()}
        if self.weightings:
            drawn[WEIGHTING] = trial.suggest_categorical(WEIGHTING, [candidate.name for candidate in self.weightings])
            chosen = self.candidate(drawn)
            for argument, allowed in chosen.space.items():
                name = f"{chosen.name}.{argument}"
                drawn[name] = _suggest(trial, name, allowed)
        if self.simplex:
            for task in tasks:
                drawn[f"importance.{task}"] = _suggest(trial, f"importance.{task}", UNIFORM)
        return drawn

    def candidate(self, drawn: Mapping[str, Any]) -> Candidate:
        """Return the weighting that was drawn."""
        return next(candidate for candidate in self.weightings if candidate.name == drawn[WEIGHTING])

    def importances(self, drawn: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, float]:
        """Compute the tasks' importances, which sum to their number; empty where they are not searched."""
        if not self.simplex:
            return {}
        shares = {task: -math.log(drawn[f"importance.{task}"]) for task in tasks}
        total = math.fsum(shares.values())
        return {task: len(shares) * share / total for task, share in shares.items()}

    def in_words(self, drawn: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
        """Return the drawn values for people to read, with the tasks' importances computed."""
        importances = {f"importance.{task}": value for task, value in self.importances(drawn, tasks).items()}
        return {**drawn, **importances}

    def varied(self) -> list[str]:
        """Return what varies, for people to read."""
        weightings = [f"weighting ({', '.join(candidate.name for candidate in self.weightings)})"]
        importances = ["the tasks' importances"] if self.simplex else []
        return [*(weightings if self.weightings else []), *importances, *self.parameters]

    def weighting_arguments(self, drawn: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
        """Return the arguments of the weighting that was drawn, its importances included."""
        chosen = self.candidate(drawn)
        arguments = {**chosen.fixed}
        for argument, allowed in chosen.space.items():
            arguments[argument] = value_of_label(allowed, drawn[f"{chosen.name}.{argument}"])
        if self.simplex:
            arguments[chosen.importance_argument] = self.importances(drawn, tasks)
        return arguments


def as_text(values: Mapping[str, Any]) -> str:
    """Write values by name on one line."""
    return ", ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )


def label(value: Any) -> Any:  # noqa: ANN401 - whatever a YAML file holds
    """Return the plain value by which Optuna knows a choice: JSON for lists and dicts."""
    return json.dumps(value) if isinstance(value, list | dict) else value


def value_of_label(allowed: Range | Choice, drawn: Any) -> Any:  # noqa: ANN401
    """Return the value that was drawn, from the plain value by which Optuna knows it."""
    if isinstance(allowed, Range):
        return drawn
    return next(value for value in allowed.values if type(label(value)) is type(drawn) and label(value) == drawn)


def _suggest(trial: optuna.Trial, name: str, allowed: Range | Choice) -> Any:  # noqa: ANN401
    if isinstance(allowed, Choice):
        return trial.suggest_categorical(name, [label(value) for value in allowed.values])
    if allowed.integer:
        return trial.suggest_int(name, int(allowed.low), int(allowed.high), log=allowed.log)
    return trial.suggest_float(name, allowed.low, allowed.high, log=allowed.log)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"{path} must hold a mapping, found {type(content).__name__}.")
    return content


def read_space(space: str | Path | Mapping[str, Any]) -> Space:
    """Read what a search varies from a YAML file or a mapping of the same form.

    Raises:
        ConfigurationError: If it is not of that form; the message names the key.

    Example:
        >>> space = read_space({"objective": "val/loss/total", "weighting": ["MGDA", "GradNorm"]})
        >>> [candidate.name for candidate in space.weightings]
        ['MGDA', 'GradNorm']
    """
    content = space if isinstance(space, Mapping) else read_yaml(space)
    source = "space" if isinstance(space, Mapping) else str(space)
    try:
        return _space(content)
    except ValueError as error:
        raise ConfigurationError(f"{source}: {error}") from error


def _space(content: Mapping[str, Any]) -> Space:
    for key in content:
        if key not in KEYS:
            raise ConfigurationError(f"unknown key {key!r}. {choices(str(key), list(KEYS))}")
    if "objective" not in content:
        raise ConfigurationError("objective is missing; name a metric to improve, such as objective: val/loss/total.")
    given = content.get("parameters") or {}
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"parameters must map paths to ranges or choices, found {given!r}.")
    parameters = {str(path): read_allowed(f"parameters.{path}", spec) for path, spec in given.items()}
    named = content.get("weighting") or []
    weightings = tuple(_candidate(entry, parameters) for entry in (named if isinstance(named, list) else [named]))
    if len({candidate.name for candidate in weightings}) < len(weightings):
        raise ConfigurationError(f"weighting names {[candidate.name for candidate in weightings]}, one of them twice.")
    simplex = content.get("importance")
    if simplex not in (None, "simplex"):
        raise ConfigurationError(f"importance must be 'simplex' or left out, found {simplex!r}.")
    if simplex and not weightings:
        raise ConfigurationError("importance goes to the weighting that is chosen; list one or more under weighting.")
    own = {f"{candidate.name}.{argument}" for candidate in weightings for argument in candidate.space}
    rest = {path: allowed for path, allowed in parameters.items() if path not in own}
    for path in rest:
        if (name := path.partition(".")[0]) in _names_of_weightings():
            listed = ", ".join(candidate.name for candidate in weightings) or "none"
            raise ConfigurationError(
                f"parameters.{path}: {name} is not among the weightings ({listed}); list it under weighting."
            )
    if not (weightings or rest):
        raise ConfigurationError("nothing varies; list weightings under weighting, or paths under parameters.")
    return Space(read_goals(content["objective"]), weightings, bool(simplex), rest)


def _candidate(entry: Any, parameters: Mapping[str, Range | Choice]) -> Candidate:  # noqa: ANN401
    path: Any = entry
    fixed: Mapping[str, Any] = {}
    if isinstance(entry, Mapping):
        path, fixed = entry.get("class_path"), entry.get("init_args") or {}
        if surplus := entry.keys() - {"class_path", "init_args"}:
            raise ConfigurationError(f"weighting: an entry has class_path and init_args, found {sorted(surplus)}.")
    method = _weighting_class(path)
    accepted = inspect.signature(method).parameters
    own = {key.partition(".")[2]: spec for key, spec in parameters.items() if key.partition(".")[0] == method.__name__}
    for argument in (*fixed, *own):
        if argument not in accepted:
            raise ConfigurationError(
                f"{method.__name__} has no argument {argument!r}. {choices(argument, [*accepted])}"
            )
    space = {name: allowed for name, allowed in {**method.search_space, **own}.items() if name not in fixed}
    required = [name for name, argument in accepted.items() if argument.default is inspect.Parameter.empty]
    if missing := [name for name in required if name not in {**fixed, **space}]:
        raise ConfigurationError(
            f"weighting: {method.__name__} needs {', '.join(missing)}; give it as "
            f"{{class_path: {method.__name__}, init_args: {{{missing[0]}: ...}}}}."
        )
    return Candidate(method, fixed, space)


def _weighting_class(path: Any) -> type[Weighting]:  # noqa: ANN401
    names = load_short_names()
    module, _, name = names.get(str(path), str(path)).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ValueError:
        found = None
    except ImportError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # it is there, and what it imports is not
            raise ConfigurationError(f"weighting: {path!r} cannot be imported: {error}.") from error
        found = None
    if not (isinstance(found, type) and issubclass(found, Weighting)):
        raise ConfigurationError(
            f"weighting: {path!r} names no weighting. {choices(str(path), _names_of_weightings())}"
        )
    return found


def _names_of_weightings() -> list[str]:
    return [name for name, where in load_short_names().items() if ".weighting." in where]


def read_allowed(key: str, spec: Any) -> Range | Choice:  # noqa: ANN401
    """Read a range or choices; the key is for the message."""
    if isinstance(spec, Range | Choice):
        return spec
    try:
        if isinstance(spec, list):
            return Choice(tuple(spec))
        if isinstance(spec, Mapping) and spec.keys() == {"choices"} and isinstance(spec["choices"], list):
            return Choice(tuple(spec["choices"]))
        if isinstance(spec, Mapping) and {"low", "high"} <= spec.keys() <= {"low", "high", "log", "integer"}:
            low, high = (float(spec[end]) for end in ("low", "high"))  # YAML takes 1e-4 for a word
            return Range(low, high, log=_flag(spec, "log"), integer=_flag(spec, "integer"))
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"{key}: {error}") from error
    raise ConfigurationError(
        f"{key} must be {{low: ..., high: ...}}, maybe with log: true or integer: true, or {{choices: [...]}}; "
        f"found {spec!r}."
    )


def _flag(spec: Mapping[str, Any], name: str) -> bool:
    value = spec.get(name, False)
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} must be true or false, found {value!r}.")
    return value
