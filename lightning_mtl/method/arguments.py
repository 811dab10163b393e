"""Arguments that many methods have are declared once, taken as ``**common``, and shown with each method's own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, get_args, get_type_hints

import lightning.pytorch as pl
from typing_extensions import Self


class CommonArguments(TypedDict, total=False):
    """Every method with weights takes these: ``def __init__(self, ..., **common: Unpack[CommonArguments])``.

    :class:`~lightning_mtl.Weighting` says what the arguments mean and has their defaults.
    """

    importance: Mapping[str, float] | None
    start_step: int
    total: float | None


class GradientArguments(CommonArguments, total=False):
    """The same, and where, how often and how gradients are measured."""

    at: str | Sequence[str]
    every_n_steps: int
    gradients: Literal["automatic", "rows"]


class AggregatorArguments(TypedDict, total=False):
    """What every :class:`~lightning_mtl.Aggregator` takes, which has no weights to rescale or to keep."""

    importance: Mapping[str, float] | None
    start_step: int
    at: Literal["trunk", "features"]


def check_common_arguments(
    method: str,
    importance: Mapping[str, float] | None,
    start_step: int,
    total: float | None,
    at: str | Sequence[str],
    every_n_steps: int,
    gradients: str,
) -> None:
    """Check the arguments that all methods have.

    Raises:
        ValueError: If one is out of its range.
    """
    for task, factor in (importance or {}).items():
        if not (math.isfinite(factor) and factor >= 0):
            raise ValueError(
                f"{method}(importance=...) gives task {task!r} the factor {factor}; use a finite number >= 0."
            )
    if start_step < 0:
        raise ValueError(f"{method}(start_step={start_step}) must be at least 0.")
    if total is not None and not (math.isfinite(total) and total > 0):
        raise ValueError(f"{method}(total={total}) must be above 0 and finite; None leaves the weights as they are.")
    if every_n_steps < 1:
        raise ValueError(f"{method}(every_n_steps={every_n_steps}) must be at least 1.")
    if gradients not in ("automatic", "rows"):
        raise ValueError(f"{method}(gradients={gradients!r}) must be 'automatic' or 'rows'.")
    if not at:
        raise ValueError(f"{method}(at={at!r}) must be 'trunk', 'features', 'last_layer' or names of modules.")


def check_tasks(
    method: str, methods: Sequence[str], module: pl.LightningModule, named: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return the tasks of a module that a method is about to train.

    Args:
        method: The method's name.
        methods: All methods in the Trainer.
        module: The module.
        named: Arguments of the method; those that map tasks to something must name the module's.

    Raises:
        TypeError: If the module has no tasks.
        ValueError: If there is another method, or an argument names an unknown task.
    """
    if len(methods) > 1:
        raise ValueError(f"The Trainer holds {len(methods)} weightings, {' and '.join(methods)}; keep one of them.")
    tasks = getattr(module, "tasks", None)
    if not isinstance(tasks, Mapping):
        raise TypeError(
            f"{method} balances the tasks of a lightning_mtl.BalancedModule or MultiTaskModule, found "
            f"{type(module).__name__}; subclass one of them."
        )
    for argument, given in named.items():
        if unknown := [task for task in given if task not in tasks] if isinstance(given, Mapping) else []:
            raise ValueError(f"{method}({argument}=...) names {unknown}, but the tasks are {list(tasks)}.")
    return tasks


PLAIN = (bool, int, float, str, tuple, list, dict)


class GivenArguments:
    """Remembers what a constructor was given, so that the object prints as the call that made it.

    Example:
        >>> class Half(GivenArguments):
        ...     def __init__(self, scale=0.5, name="half"):
        ...         self.factor = scale
        >>> Half(), Half(scale=0.25)
        (Half(), Half(scale=0.25))
        >>> Half().arguments
        {'scale': 0.5, 'name': 'half'}
    """

    arguments: dict[str, Any]
    """The constructor's arguments by name, defaults included; what it refuses itself is not in here."""

    def __new__(cls, *values: object, **arguments: object) -> Self:
        """Bind the arguments to their names."""
        made = super().__new__(cls)
        try:
            bound = inspect.signature(cls).bind_partial(*values, **arguments)
        except TypeError:  # the constructor says so with its own name
            made.arguments = {}
            return made
        bound.apply_defaults()
        made.arguments = {}
        for name, value in bound.arguments.items():
            kind = bound.signature.parameters[name].kind
            if kind is not inspect.Parameter.VAR_POSITIONAL or value:
                made.arguments |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        return made

    def __repr__(self) -> str:
        defaults = {name: one.default for name, one in inspect.signature(type(self)).parameters.items()}
        shown = {k: value for k, value in self.arguments.items() if k not in defaults or not _same(value, defaults[k])}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def _same(value: object, default: object) -> bool:
    # Tensors and arrays compare element by element, and are no defaults.
    return value is default or (isinstance(value, type(default)) and isinstance(value, PLAIN) and value == default)


class NamedArguments(GivenArguments):
    """Spells out, in the signature of a subclass, what its constructor takes as ``**common``; refuses anything else."""

    def __init_subclass__(cls, **arguments: Any) -> None:  # noqa: ANN401 - what a class statement may hold
        """Show the common arguments in the signature, for the command line, searches and ``help``."""
        super().__init_subclass__(**arguments)
        constructor = vars(cls).get("__init__")
        if constructor is not None and (signature := _in_full(constructor, super(cls, cls).__init__)):
            constructor.__signature__ = signature

    def __new__(cls, *values: object, **arguments: object) -> Self:
        """Refuse arguments that the class does not have, which only a base class would notice, or take.

        Raises:
            TypeError: Naming the class and its arguments, one that maps tasks to numbers and is a sequence, or one that
                is no number.
        """
        accepted = inspect.signature(cls).parameters
        unknown = [name for name in arguments if name not in accepted]
        if unknown and not any(one.kind is one.VAR_KEYWORD for one in accepted.values()):
            raise TypeError(f"{cls.__name__} has no argument {unknown[0]!r}; it takes {', '.join(accepted) or 'none'}.")
        made = super().__new__(cls, *values, **arguments)
        for name in ("importance", *getattr(cls, "by_task", ())):
            if isinstance(value := made.arguments.get(name), (str, list, tuple)):
                raise TypeError(
                    f"{cls.__name__}({name}={value!r}) must be {{task: ...}}; found {type(value).__name__}."
                )
        for name, value in made.arguments.items():
            _check_numbers(cls.__name__, name, value, accepted.get(name))
        return made


NUMBERS = {"float", "int", "float | None", "int | None"}
NUMBERS_BY_TASK = {"Mapping[str, float]", "Mapping[str, float] | None"}


def _check_numbers(method: str, name: str, value: object, parameter: inspect.Parameter | None) -> None:
    """Refuse what is no number where a parameter is annotated as one, or as numbers by task."""
    kind = "" if parameter is None else inspect.formatannotation(parameter.annotation)
    kind = kind.strip("'").removeprefix("collections.abc.")
    if value is None and kind.endswith("| None"):
        return
    if kind in NUMBERS and not hasattr(value, "__float__"):
        raise TypeError(f"{method}({name}={value!r}) must be a number; found {type(value).__name__}.")
    for task, own in value.items() if kind in NUMBERS_BY_TASK and isinstance(value, Mapping) else ():
        if not hasattr(own, "__float__"):
            raise TypeError(
                f"{method}({name}=...) gives task {task!r} {own!r}: it must be a number; found {type(own).__name__}."
            )


def _in_full(constructor: Any, inherited: Any) -> inspect.Signature | None:  # noqa: ANN401 - functions' attributes
    """The signature with the keys of ``**common: Unpack[...]`` spelled out, their defaults those of the base class."""
    signature = inspect.signature(constructor)
    *own, last = signature.parameters.values()
    if last.kind is not last.VAR_KEYWORD or "Unpack[" not in str(last.annotation):
        return None
    try:
        unpacked = eval(str(last.annotation), constructor.__globals__)
    except NameError:  # Known to type checkers alone: then they alone know the arguments.
        return None
    (keys,) = get_args(unpacked)
    kinds, known = get_type_hints(keys), inspect.signature(inherited).parameters
    if not kinds.keys() <= known.keys():  # The class takes some of them for itself.
        return None
    # Types, not their names: those would be looked up where the class is, which need not import them.
    common = [known[name].replace(annotation=kind) for name, kind in kinds.items()]
    return signature.replace(parameters=[*own, *common])
