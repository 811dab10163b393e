"""Hooks that a user sets on an instance are wrapped as those of its class are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

Hook = TypeVar("Hook", bound=Callable[..., Any])


def wrap_own(module: nn.Module, name: str, wrap: Callable[[Any], Any]) -> None:
    """Wrap a hook that a module has as an attribute of its own, as ``module.optimizer_step = f`` sets it, once.

    Args:
        module: The module.
        name: The hook's name.
        wrap: What the class wraps its methods of this name with.
    """
    own = vars(module).get(name)
    if own is not None and not hasattr(own, "wraps_own"):
        wrapped = functools.partial(wrap(lambda _, *arguments, **named: own(*arguments, **named)), module)
        wrapped.wraps_own = True  # type: ignore[attr-defined]
        setattr(module, name, wrapped)
