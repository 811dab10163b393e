"""A callback with state that holds others passes on to them every hook, and what becomes of its state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from lightning_mtl.method.task_state import TaskState


class Holder(TaskState):
    """Lets other callbacks, which the Trainer does not hold, live as if it did.

    Every hook of Lightning reaches them with the same arguments, after the holder's own. Their state is saved,
    restored, moved, reset and cut to the present tasks with the holder's. What they decide is for the holder to ask.
    The class stands first among the bases; a subclass that overrides a hook calls ``super()`` in it.
    """

    _children: Sequence[TaskState] = ()

    def add_child(self, child: TaskState) -> None:
        """Hold one more callback."""
        self._children = (*self._children, child)

    def reset(self, tasks: Sequence[str], device: torch.device | str = "cpu") -> None:
        """Begin anew, for these tasks, the children as well."""
        super().reset(tasks, device)
        for child in self._children:
            child.reset(tasks, device)

    @contextmanager
    def only(self, present: Sequence[int]) -> Iterator[None]:
        """Cut the children's states, too."""
        with super().only(present), ExitStack() as children:
            for child in self._children:
                children.enter_context(child.only(present))
            yield

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, with the children's states."""
        return super().state_dict() | {"children": [child.state_dict() for child in self._children]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ValueError: If the state is of other children, of other tasks, or of other arguments.
        """
        super().load_state_dict(state_dict)
        names = [type(child).__name__ for child in self._children]
        if (written := [state["weighting"] for state in state_dict["children"]]) != names:
            raise ValueError(
                f"The checkpoint's {type(self).__name__} held {written}, this one holds {names}; construct it as in "
                "the interrupted run, or load the model's weights alone."
            )
        for child, state in zip(self._children, state_dict["children"], strict=True):
            child.load_state_dict(state)


def _passed_on(name: str) -> Callable[..., None]:
    def hook(self: Holder, *arguments: Any, **named: Any) -> None:  # noqa: ANN401 - each hook has its own
        getattr(super(Holder, self), name)(*arguments, **named)
        for child in self._children:
            getattr(child, name)(*arguments, **named)

    hook.__name__ = name
    return hook


# Read off Lightning, so that none is missing, whatever hooks another release has.
for _name in vars(Callback):
    if _name in ("setup", "teardown") or _name.startswith("on_"):
        setattr(Holder, _name, _passed_on(_name))
