"""What a YAML file may call by name alone."""

from __future__ import annotations

import importlib
import importlib.util

ROOMS = ("weighting", "architectures", "monitors", "learning_rates", "data", "finetuning")


def load_short_names() -> dict[str, str]:
    """Import everything the package exports, which is what lets jsonargparse find a class by its name alone.

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
