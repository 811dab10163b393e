"""Refuses arguments of a module that are of another kind, or belong elsewhere."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import lightning.pytorch as pl


def check_factories(optimizer: object, lr_scheduler: object) -> None:
    """Refuse what is no function of parameters, or of the optimizer.

    Raises:
        TypeError: Naming what was found, and what to give.
    """
    for name, given, example in (
        ("optimizer", optimizer, "functools.partial(torch.optim.Adam, lr=1e-3)"),
        ("lr_scheduler", lr_scheduler, "functools.partial(torch.optim.lr_scheduler.StepLR, step_size=10)"),
    ):
        if callable(given) or (given is None and name == "lr_scheduler"):
            continue
        argument = "the parameters" if name == "optimizer" else "the optimizer"
        found = "None; leave the argument out for Adam" if given is None else f"{type(given).__name__}, an object"
        raise TypeError(
            f"{name} must be a function that is called with {argument}, such as {example}; found {found}. For anything "
            "else override configure_optimizers."
        )


def refuse_callbacks(cls: type, given: Sequence[object], named: Mapping[str, object]) -> None:
    """Refuse a callback among the arguments of a module whose constructor does not take it.

    Raises:
        TypeError: Saying where it belongs.
    """
    found = [one for one in (*given, *named.values()) for one in (one if isinstance(one, list) else [one])]
    callbacks = [one for one in found if isinstance(one, pl.Callback)]
    if not callbacks:
        return
    try:
        inspect.signature(cls).bind(*given, **named)
    except TypeError as error:
        raise TypeError(
            f"{cls.__name__} was given {callbacks[0]!r}, which is a callback and no part of the module; it goes to the "
            f"Trainer: Trainer(callbacks=[{callbacks[0]!r}])."
        ) from error
