"""A trunk, or any part of it, may say more of itself than its forward pass does; an ordinary module says nothing."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn


class Penalized(Protocol):
    """A module with terms of its own in the objective; one that holds another such module forwards its terms."""

    def penalties(self) -> dict[str, Tensor]:
        """``{name: scalar}``, added with weight 1 and logged as ``penalty/<name>``.

        It may take ``tasks``, the tasks of the step, so that what other tasks alone use is left where it is.
        """


class PartlyShared(Protocol):
    """A module of which some parameters serve one task alone."""

    def shared_parameters(self) -> list[nn.Parameter]:
        """The parameters that several tasks share."""


class PerTask(Protocol):
    """A module that can leave out what only other tasks need; ``{task: features}`` comes back for the named ones.

    One with an attribute ``tasks`` is asked for those of its tasks alone. ``takes_tasks = False``, as of a module that
    mixes the tasks' features again, has all that lies inside it computed every time, and shared by all tasks.
    """

    takes_tasks: ClassVar[bool] = True

    def forward(self, *inputs: Any, tasks: Sequence[str] | None = None, **named: Any) -> dict[str, Any]:  # noqa: ANN401
        """Compute the features of ``tasks``, of all of them where it is None."""


class Owned(Protocol):
    """A module with parameters that no other task's loss depends on, even where an operation on all tasks has them."""

    def own_parameters(self, task: str) -> list[nn.Parameter]:
        """The parameters of one task; a task that is absent leaves them without gradients."""


class HasSingleTask(Protocol):
    """A module that knows what a model of one task would have in its place."""

    def single_task(self, task: str) -> nn.Module:
        """Return that module: it takes the same inputs and returns the features of this task."""


# Attributes are asked for by name: a compiled module forwards them, but is no instance of what it holds.


def takes_tasks(module: nn.Module) -> bool:
    """Whether a module is :class:`PerTask`."""
    return bool(getattr(module, "takes_tasks", False))


def outermost(module: nn.Module, name: str, path: str = "") -> Iterator[tuple[str, Any]]:
    """The outermost modules that have something by this name, each with its path; ``""`` is the module itself."""
    said = getattr(module, name, None)
    if callable(said) or said is True:
        yield path, module
    # What lies inside speaks of single tasks, which such a module mixes again.
    elif name == "penalties" or getattr(module, "takes_tasks", None) is not False:
        for child_name, child in module.named_children():
            yield from outermost(child, name, f"{path}.{child_name}" if path else child_name)


class TrunkParts:
    """What a trunk and the parts inside it say of themselves, put together; looked for once.

    Args:
        trunk: The trunk.
        tasks: All tasks of the model.

    Attributes:
        per_task: The parts that can compute single tasks.
        penalized: The parts with penalties, by path.
        divided: Whether some part says which parameters tasks share.
        owning: The parts that name parameters of single tasks.
        merges: Whether the trunk was seen to mix again what a part inside it returned for single tasks.

    Example:
        >>> class Norm(nn.Linear):
        ...     def penalties(self):
        ...         return {"norm": self.weight.norm()}
        >>> list(TrunkParts(nn.Sequential(Norm(1, 1), nn.ReLU()), ["a"]).penalties(None))
        ['norm']
        >>> list(TrunkParts(nn.Sequential(Norm(1, 1), Norm(1, 1)), ["a"]).penalties(None))
        ['0.norm', '1.norm']
    """

    def __init__(self, trunk: nn.Module, tasks: Collection[str]) -> None:
        self.trunk, self.tasks = trunk, tasks
        self.per_task = [part for _, part in outermost(trunk, "takes_tasks")]
        self.penalized = [(path, part, _takes_names(part.penalties)) for path, part in outermost(trunk, "penalties")]
        self.divided = any(True for _ in outermost(trunk, "shared_parameters"))
        self.owning = [part for _, part in outermost(trunk, "own_parameters")]
        self.nested = bool(self.per_task) and not takes_tasks(trunk)
        self.merges = False
        for part in self.per_task if self.nested else ():
            # It stays: what is compiled with it reads the tasks anew, and would never see one that comes and goes.
            if _tell_tasks not in part._forward_pre_hooks.values():
                part.register_forward_pre_hook(_tell_tasks, with_kwargs=True)
                part.asked_tasks = None

    def call(self, inputs: Sequence[Any], named: Mapping[str, Any], tasks: Sequence[str]) -> Any:  # noqa: ANN401
        """Call the trunk for ``tasks``; parts that can leave out what only other tasks need do so.

        Raises:
            ValueError: If tasks were left out, and the trunk returns no features of single tasks.
        """
        if not self.nested:
            return self.trunk(*inputs, **named, **({"tasks": tuple(tasks)} if self.per_task else {}))
        self.ask(tasks)
        try:
            features = self.trunk(*inputs, **named)
        finally:
            self.ask(None)
        asked = [set(own) for part in self.per_task if (own := self._of(part, tasks))]
        self.merges = not all(_holds_each(features, own) for own in asked)
        if self.merges and len(tasks) < len(self.tasks):
            raise ValueError(
                f"{type(self.per_task[0]).__name__} inside the trunk was asked for the tasks {list(tasks)} alone, but "
                f"{type(self.trunk).__name__} returns nothing by the names of tasks: it seems to mix what it got. Set "
                "its attribute takes_tasks = False to have all tasks computed every time, or return {task: features}."
            )
        return features

    def ask(self, tasks: Sequence[str] | None) -> None:
        """Have the parts inside the trunk compute ``tasks`` in each call from now on; None for all."""
        for part in self.per_task:
            part.asked_tasks = self._of(part, tasks)

    def _of(self, part: Any, tasks: Sequence[str] | None) -> tuple[str, ...] | None:  # noqa: ANN401
        """Those of ``tasks`` that a part knows; None, which asks for all, where it knows none of the model's."""
        own = getattr(part, "tasks", None)
        if tasks is None or own is None:
            return None if tasks is None else tuple(tasks)
        return tuple(task for task in tasks if task in own) if any(task in own for task in self.tasks) else None

    def penalties(self, tasks: Sequence[str] | None) -> dict[str, Tensor]:
        """All parts' penalties in a step with ``tasks``; a name that several parts use gets each part's path in front.

        Args:
            tasks: The tasks of the step; None for all.
        """
        found = [
            (path, part.penalties(tasks=self._of(part, tasks)) if by_task else part.penalties())
            for path, part, by_task in self.penalized
        ]
        names = [name for _, penalties in found for name in penalties]
        return {
            name if names.count(name) == 1 else f"{path}.{name}": value
            for path, penalties in found
            for name, value in penalties.items()
        }

    def shared_parameters(self) -> list[nn.Parameter]:
        """The parameters that several tasks share: what the parts that say so name, and all that lies outside them."""
        return list(dict.fromkeys(self._shared(self.trunk)))

    def _shared(self, module: Any) -> Iterator[nn.Parameter]:  # noqa: ANN401 - a part may be a compiled one
        mixed = self.merges and module in self.per_task
        if callable(getattr(module, "shared_parameters", None)) and not mixed:
            yield from module.shared_parameters()
        elif mixed or getattr(module, "takes_tasks", None) is False:
            yield from module.parameters()
        else:
            yield from module.parameters(recurse=False)
            for child in module.children():
                yield from self._shared(child)

    def owned(self, tasks: Collection[str]) -> list[nn.Parameter]:
        """The parameters of these tasks, and of no other."""
        known = [(task, part) for part in self.owning for task in getattr(part, "tasks", self.tasks)]
        others = {p for task, part in known if task not in tasks for p in part.own_parameters(task)}
        mine = (p for task, part in known if task in tasks for p in part.own_parameters(task))
        return [p for p in dict.fromkeys(mine) if p not in others]

    def single_task(self, task: str) -> nn.Module | None:
        """The trunk that a model of one task would have; None where no part knows.

        A part inside the trunk is replaced by its own form for the task; parameters stay the same objects.
        """
        trunk: Any = getattr(self.trunk, "_orig_mod", self.trunk)  # a compiled one's copy would be compiled again
        parts = [part for _, part in outermost(trunk, "single_task")]
        if trunk in parts:
            own: nn.Module = trunk.single_task(task)
            return own
        if not parts:
            return None
        memo: dict[int, Any] = {id(tensor): tensor for tensor in (*trunk.parameters(), *trunk.buffers())}
        known = [part for part in parts if task in getattr(part, "tasks", [task])]
        memo.update((id(part), OneTask(task, part.single_task(task))) for part in known)
        copied: nn.Module = copy.deepcopy(trunk, memo)
        return copied


class OneTask(nn.Module):
    """Stands in for a part that has an output for each task: it has that of one."""

    takes_tasks: ClassVar[bool] = True

    def __init__(self, task: str, model: nn.Module) -> None:
        super().__init__()
        self.tasks, self.model = (task,), model

    def forward(self, *inputs: Any, tasks: Sequence[str] | None = None, **named: Any) -> dict[str, Any]:  # noqa: ANN401
        """Return ``{task: features}``, whatever is asked for."""
        del tasks
        return {self.tasks[0]: self.model(*inputs, **named)}


def _takes_names(function: Callable[..., object]) -> bool:
    return "tasks" in inspect.signature(function).parameters


def _tell_tasks(part: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:  # noqa: ANN401
    """Pass on to a part what the trunk is asked for, unless the trunk does so itself."""
    if part.asked_tasks is None or "tasks" in named:
        return None
    return inputs, {**named, "tasks": part.asked_tasks}


def _holds_each(data: Any, tasks: Collection[str]) -> bool:  # noqa: ANN401 - whatever a trunk returns
    """Whether somewhere in a nested structure there is a mapping with these keys."""
    if isinstance(data, Mapping):
        return data.keys() >= set(tasks) or any(_holds_each(value, tasks) for value in data.values())
    if isinstance(data, tuple | list):
        return any(_holds_each(value, tasks) for value in data)
    if dataclasses.is_dataclass(data):
        return any(_holds_each(getattr(data, field.name, None), tasks) for field in dataclasses.fields(data))
    return False
