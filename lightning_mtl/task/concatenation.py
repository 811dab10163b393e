"""The inputs of several tasks are put together for one pass of the trunk, and taken apart again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_mtl.task.labels import number_of_samples


def concatenate(inputs: Mapping[str, Any]) -> tuple[Any, dict[str, slice]]:
    """Put tasks' inputs behind each other; the whole, and the rows of each task in it.

    Args:
        inputs: ``{task: inputs}``, nested structures of the same form, whose tensors agree in all dimensions but the
            first. What is no tensor has to be equal.

    Raises:
        ValueError: If they differ in form, naming two tasks.

    Example:
        >>> whole, rows = concatenate({"a": torch.zeros(2, 3), "b": torch.ones(4, 3)})
        >>> whole.shape, rows["b"]
        (torch.Size([6, 3]), slice(2, 6, None))
    """
    sizes = [number_of_samples(tuple(own) if isinstance(own, list) else own) for own in inputs.values()]
    rows, first = {}, 0
    for task, size in zip(inputs, sizes, strict=True):
        rows[task] = slice(first, first + size)
        first += size
    return _join(list(inputs.values()), list(inputs), sizes), rows


def _join(parts: Sequence[Any], tasks: Sequence[str], sizes: Sequence[int]) -> Any:  # noqa: ANN401
    first = parts[0]
    for part, task in zip(parts, tasks, strict=True):
        if type(part) is not type(first) or _form(part) != _form(first):
            raise _refusal(tasks[0], first, task, part)
    if isinstance(first, Tensor):
        if any(part.ndim == 0 or part.shape[0] != size for part, size in zip(parts, sizes, strict=True)):
            raise ValueError(
                "concatenate_inputs=True needs inputs whose tensors all have one row a sample; "
                f"task {tasks[0]!r} has a tensor of shape {list(first.shape)} beside {sizes[0]} samples. Leave "
                "concatenate_inputs False."
            )
        return torch.cat(list(parts))
    if isinstance(first, Mapping):
        return {key: _join([part[key] for part in parts], tasks, sizes) for key in first}
    if isinstance(first, tuple | list):
        return type(first)([_join(column, tasks, sizes) for column in zip(*parts, strict=True)])
    return first


def _form(part: Any) -> Any:  # noqa: ANN401
    """What has to be the same for all tasks."""
    if isinstance(part, Tensor):
        return tuple(part.shape[1:]), part.dtype
    if isinstance(part, Mapping):
        return set(part)
    return len(part) if isinstance(part, tuple | list) else part


def _refusal(one: str, found: Any, other: str, differing: Any) -> ValueError:  # noqa: ANN401
    def describe(part: Any) -> str:  # noqa: ANN401
        if isinstance(part, Tensor):
            return f"a tensor of {part.dtype} and shape {list(part.shape)}"
        if isinstance(part, Mapping):
            return f"a mapping with the keys {sorted(map(str, part))}"
        return f"a {type(part).__name__} of {len(part)}" if isinstance(part, tuple | list) else repr(part)

    return ValueError(
        "concatenate_inputs=True needs inputs that agree in all but the first dimension; "
        f"{one!r} has {describe(found)}, {other!r} has {describe(differing)}. Leave concatenate_inputs False, or bring "
        "the inputs into one shape."
    )


def rows_of(task: str, rows: Mapping[str, slice], features: Any) -> Any:  # noqa: ANN401 - any nested structure
    """One task's rows of what the trunk made of all.

    Raises:
        ValueError: If a feature has another number of rows than went in.
    """
    total = max(own.stop for own in rows.values())

    def take(value: Tensor) -> Tensor:
        if value.ndim == 0 or value.shape[0] != total:
            raise ValueError(
                f"concatenate_inputs=True needs a trunk that returns one row a sample; {total} samples came back as a "
                f"tensor of shape {list(value.shape)}. Leave concatenate_inputs False."
            )
        return value[rows[task]]

    return apply_to_collection(features, Tensor, take)
