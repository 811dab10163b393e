"""Names that a configuration may use, and those that a wrong one may stand for."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_mtl.method.base import Weighting

ROOMS = ("weighting", "architectures", "monitors", "learning_rates", "control", "data", "finetuning")


def load_short_names() -> dict[str, str]:
    """Import everything that the package exports, so that jsonargparse finds a class by its name alone.

    Returns:
        Each name and its class path, sorted.

    Example:
        >>> load_short_names()["MGDA"]
        'lightning_mtl.weighting.MGDA'
    """
    names = {}
    for room in ROOMS:
        path = f"lightning_mtl.{room}"
        for name in importlib.import_module(path).__all__:
            names[name] = f"{path}.{name}"
    return dict(sorted(names.items()))


# Whose names are meant where a key ends so; elsewhere it is the package's.
MODULES = {"optimizer": "torch.optim", "lr_scheduler": "torch.optim.lr_scheduler"}
MOST_LISTED = 60
"""A message lists all names there are up to this number, and beyond it those alone that a wrong one is like."""


def unknown_name(name: str, key: str | None) -> str:
    """Say that a name without dots is unknown where a key stands, and which ones may be meant.

    Args:
        name: The name.
        key: The keys that lead to it, with dots.

    Example:
        >>> unknown_name("crossentropy", "model.tasks.loss")
        "'crossentropy' is no class path. Did you mean torch.nn.functional.cross_entropy?"
    """
    part = (key or "").rpartition(".")[2]
    if part == "loss":
        close = nearest(name, _losses())
        meant = (
            f"Did you mean torch.nn.functional.{close[0]}?" if close else "A loss is a function or a class of torch."
        )
        return f"{name!r} is no class path. {meant}"
    if (module := MODULES.get(part)) is not None:
        return f"{name!r} is no class path, and no name of {module}. {choices(name, public_names(module))}"
    names = load_short_names() | {"MultiTaskModule": "lightning_mtl.MultiTaskModule"}
    known = [own for own, path in names.items() if _fits(path, part)] or list(names)
    if (close := nearest(name, known)) and ".weighting." in names[close[0]]:
        known = [own for own in known if ".weighting." in names[own]]
    return f"{name!r} is no class path, and no name of this package. {choices(name, known)}"


def _fits(path: str, part: str) -> bool:
    """Whether the class of a path can stand under a key's last part."""
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    if not isinstance(found, type):
        return False
    if part == "callbacks":
        return issubclass(found, Callback)
    if part == "weighting":
        return issubclass(found, Weighting)
    if part in ("model", "data"):
        return issubclass(found, pl.LightningModule if part == "model" else pl.LightningDataModule)
    return issubclass(found, nn.Module) if part in ("trunk", "heads") else True


def _losses() -> list[str]:
    """The losses among torch's functions."""
    return [
        name for name in public_names("torch.nn.functional") if "loss" in name or "entropy" in name or "_div" in name
    ]


def public_names(module_name: str) -> list[str]:
    """Return the names that a module exports, or the classes and functions that it defines, without private ones."""
    module: Any = importlib.import_module(module_name)
    if hasattr(module, "__all__") and any(isinstance(getattr(module, name), type) for name in module.__all__):
        return [name for name in module.__all__ if isinstance(getattr(module, name), type)]
    # Functions written in C name the module of their implementation.
    own = (module_name, "torch._C._nn")
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) in own
    ]


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """Return up to three known names that a wrong one is like, the nearest first; case and underscores count little.

    Example:
        >>> nearest("crossentropy", ["nll_loss", "cross_entropy"])
        ['cross_entropy']
    """
    plain: dict[str, str] = {}
    for one in known:
        plain.setdefault(one.lower().replace("_", ""), one)
    found = difflib.get_close_matches(name.lower().replace("_", ""), list(plain), n=3, cutoff=0.6)
    return [plain[one] for one in found]


def choices(name: str, known: Sequence[str]) -> str:
    """Name those most like a wrong name, then all there are, unless they are too many to read.

    Example:
        >>> choices("losss", ["loss", "error"])
        'Did you mean loss? There are error, loss.'
    """
    close = nearest(name, known)
    meant = f"Did you mean {' or '.join(close)}?" if close else ""
    listed = f"There are {', '.join(sorted(known))}." if len(known) <= MOST_LISTED else ""
    return " ".join(part for part in (meant, listed) if part) or f"None of {len(known)} names is like it."
