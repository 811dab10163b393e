"""The rows of a comparison: single tasks, equal and fixed weights, scales, and any weighting methods."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn
from torch.nn import functional

from lightning_mtl.configured.messages import ConfigurationError, OneLineParser, in_one_line
from lightning_mtl.configured.names import choices, load_short_names
from lightning_mtl.method.base import Weighting
from lightning_mtl.task import Task
from lightning_mtl.transfer.values import digest_of
from lightning_mtl.weighting import StaticWeights

SINGLE, EQUAL, STANDARDIZED = "single task", "equal weights", "standardized targets"
INITIAL, FIXED = "1 / L(0)", "fixed weights"
# Their names on the command line.
SHORT = {"single": SINGLE, "equal": EQUAL, "standardized": STANDARDIZED, "initial": INITIAL, "fixed": FIXED}
DEFAULT_METHODS = ("UncertaintyWeighting", "NashMTL")
REGRESSION_MODULES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)
REGRESSION_FUNCTIONS = (functional.mse_loss, functional.l1_loss, functional.smooth_l1_loss, functional.huber_loss)

MethodSpec = str | Mapping[str, Any] | Callable[[], Weighting]
Methods = Sequence[str | Mapping[str, Any]] | Mapping[str, MethodSpec]


@dataclass(frozen=True)
class Row:
    """Holds what one row of a comparison trains.

    Args:
        name: What the table calls it.
        key: Its name in the study, which tells other arguments apart.
        make: Makes the weighting of a variant, of which most rows have one; None stands for equal weights.
        variants: What each variant is, for people to read.
        changes: Fields of tasks that it changes, ``{task: {field: value}}``.
        alone: Whether each task is trained alone.
    """

    name: str
    key: str
    make: Callable[[int], Weighting | None]
    variants: tuple[str, ...] = ("",)
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    alone: bool = False


def is_regression(loss: object) -> bool:
    """Return whether a loss is one of torch's for real numbers, whose targets can be standardized.

    Example:
        >>> is_regression(functional.huber_loss), is_regression(nn.L1Loss()), is_regression(nn.NLLLoss())
        (True, True, False)
    """
    inner = loss.func if isinstance(loss, functools.partial) else loss
    return isinstance(inner, REGRESSION_MODULES) or any(inner is known for known in REGRESSION_FUNCTIONS)


def equal(_: int) -> None:
    """Weigh nothing: no callback means equal weights."""


def read_rows(
    tasks: Mapping[str, Task], kinds: Sequence[str], methods: Methods, draws: int
) -> tuple[list[Row], dict[str, str]]:
    """Make the rows.

    Args:
        tasks: The module's tasks.
        kinds: Names of the rows without a method, as on the command line; equal weights are always there.
        methods: Names, or class paths with arguments, or functions by name.
        draws: How many sets of fixed weights there are to choose from.

    Returns:
        The rows in the table's order, and ``{row: why it is left out}``.

    Raises:
        ConfigurationError: If a name is unknown or double, or a method cannot be made.
    """
    for kind in kinds:
        if kind not in SHORT:
            raise ConfigurationError(f"rows: {kind!r} is no row. {choices(kind, list(SHORT))}")
    if "fixed" in kinds and draws < 1:
        raise ConfigurationError(f"draws={draws} must be at least 1; leave the row 'fixed' out for none.")
    left_out: dict[str, str] = {}
    rows: list[Row] = []
    if "single" in kinds:
        rows.append(Row(SINGLE, SINGLE, equal, alone=True))
    rows.append(Row(EQUAL, EQUAL, equal))
    if "standardized" in kinds:
        regressions = [name for name, task in tasks.items() if is_regression(task.loss)]
        raw = {name: {"standardize": True} for name in regressions if tasks[name].standardize is False}
        if raw:
            rows.append(Row(STANDARDIZED, STANDARDIZED, equal, changes=raw))
        else:
            left_out[STANDARDIZED] = (
                "all regressions are standardized already, in every row"
                if regressions
                else "no task's loss is one of torch's for real numbers (mse, l1, smooth l1, huber)"
            )
    if "initial" in kinds:
        unscaled = {name: {"loss_scale": "initial"} for name, task in tasks.items() if task.loss_scale is None}
        if unscaled:
            rows.append(Row(INITIAL, INITIAL, equal, changes=unscaled))
        else:
            left_out[INITIAL] = "all tasks have a loss_scale already, in every row"
    if "fixed" in kinds:
        drawn = fixed_weights(list(tasks), draws)
        texts = tuple(", ".join(f"{task} {weight:.2f}" for task, weight in own.items()) for own in drawn)
        rows.append(Row(FIXED, FIXED, lambda variant: StaticWeights(drawn[variant]), texts))
    rows += [_method_row(name, spec, tasks) for name, spec in _named(methods)]
    names = [row.name for row in rows]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise ConfigurationError(
            f"methods name {doubled[0]!r} twice; give a mapping {{name: method}} to tell them apart."
        )
    return rows, left_out


def fixed_weights(tasks: Sequence[str], draws: int) -> list[dict[str, float]]:
    """Draw sets of fixed weights uniformly from the simplex, times the number of tasks; always the same ones.

    More draws begin with the same sets.

    Example:
        >>> [round(sum(weights.values()), 6) for weights in fixed_weights(["a", "b", "c"], 2)]
        [3.0, 3.0]
    """
    generator = np.random.default_rng(0)
    shares = [generator.dirichlet(np.ones(len(tasks))) for _ in range(draws)]
    return [dict(zip(tasks, (len(tasks) * own).tolist(), strict=True)) for own in shares]


def _named(methods: Methods) -> list[tuple[str, MethodSpec]]:
    if isinstance(methods, Mapping):
        return list(methods.items())
    if isinstance(methods, str):
        methods = [methods]
    named: list[tuple[str, MethodSpec]] = []
    for spec in methods:
        path = spec.get("class_path") if isinstance(spec, Mapping) else spec
        if not isinstance(path, str) or (isinstance(spec, Mapping) and spec.keys() - {"class_path", "init_args"}):
            raise ConfigurationError(f"methods: {spec!r} is neither a name nor {{class_path: ..., init_args: ...}}.")
        given = (spec.get("init_args") or {}) if isinstance(spec, Mapping) else {}
        words = ", ".join(f"{name}={_short(value)}" for name, value in given.items())
        named.append((path.rpartition(".")[2] + (f"({words})" if words else ""), spec))
    return named


def _short(value: object) -> str:
    """A value in a row's name; of a nested object its class alone."""
    if isinstance(value, Mapping) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    return str(value)


def _method_row(name: str, spec: MethodSpec, tasks: Mapping[str, Task]) -> Row:
    if not isinstance(spec, str | Mapping):
        return Row(name, f"{name} {digest_of(spec)[:8]}", lambda _: _checked(name, spec()))
    entry: dict[str, Any] = dict(spec) if isinstance(spec, Mapping) else {"class_path": spec}
    if str(entry["class_path"]).rpartition(".")[2] == "UncertaintyWeighting":
        # It weighs a regression and a classification differently, and takes all for regressions unless it is told.
        kinds = {task: "regression" if is_regression(own.loss) else "classification" for task, own in tasks.items()}
        entry["init_args"] = {"kinds": kinds, **(entry.get("init_args") or {})}
    made = functools.partial(make_weighting, entry)
    made()  # mistakes show before the first training
    return Row(name, f"{name} {digest_of(entry)[:8]}", lambda _: made())


def _checked(name: str, made: object) -> Weighting:
    if not isinstance(made, Weighting):
        raise ConfigurationError(f"methods: {name!r} made {type(made).__name__}, which is no Weighting.")
    return made


def make_weighting(entry: Mapping[str, Any]) -> Weighting:
    """Make a weighting from its class path, or short name, and arguments.

    Raises:
        ConfigurationError: If there is no such class, or it refuses an argument.

    Example:
        >>> make_weighting({"class_path": "GradNorm", "init_args": {"alpha": 0.5}})
        GradNorm(alpha=0.5)
    """
    load_short_names()
    parser = OneLineParser(exit_on_error=False)
    parser.add_subclass_arguments(Weighting, "method")
    with in_one_line():
        parsed = parser.parse_object({"method": dict(entry)})
    try:
        # From jsonargparse 4.49 on, the older name warns that it is deprecated.
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
        made: Weighting = instantiate(parsed).method
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"methods: {entry['class_path']}: {error}") from error
    return made
