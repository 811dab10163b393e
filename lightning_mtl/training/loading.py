"""Loads a module from a checkpoint: what a command line has built is built again, and what is missing is named."""

from __future__ import annotations

import inspect
from collections.abc import Collection

import lightning.pytorch as pl

# Set where Lightning's command line makes a module; no other sign tells of it.
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters


def keep_configuration(module: pl.LightningModule) -> None:
    """Save how a configuration file describes the module with its checkpoints, so that these rebuild trunk and heads.

    Elsewhere nothing is saved: modules are no plain values, and would be in every checkpoint a second time.
    """
    if _given_hyperparameters.get() is not None:
        module.save_hyperparameters(logger=False)


def missing_arguments(cls: type[pl.LightningModule], given: Collection[str], error: TypeError) -> TypeError | None:
    """Name the constructor's arguments that neither a checkpoint nor the call has; None where that is not the error.

    Args:
        cls: The class to load.
        given: The arguments of the call.
        error: What the constructor has raised.
    """
    if "missing" not in str(error) or f"{cls.__name__}.__init__()" not in str(error):
        return None
    needed = [
        name
        for name, one in inspect.signature(cls).parameters.items()
        if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD) and name not in given
    ]
    shown = ", ".join(f"{name}=..." for name in needed)
    return TypeError(
        f"{cls.__name__}.load_from_checkpoint needs {', '.join(needed)}, which the checkpoint does not hold. Give "
        f"them: {cls.__name__}.load_from_checkpoint(path, {shown}). Call self.save_hyperparameters() in a "
        "constructor whose arguments are plain values to have a checkpoint hold them; checkpoints of lightning-mtl "
        "fit always do."
    )
