"""What the API reference has an entry for: every public name of the package, by page."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from types import ModuleType
from typing import Any, get_origin

import lightning_mtl

# Modules without ``__all__`` that users import from, and what of them is meant for users.
WITHOUT_ALL = {
    "lightning_mtl.metrics": (
        "delta_m",
        "transfer_gain",
        "mean_rank",
        "Interval",
        "bootstrap_interval",
        "paired_bootstrap_interval",
    ),
    "lightning_mtl.trunk": ("Penalized", "PartlyShared", "PerTask", "Owned", "HasSingleTask"),
    "lightning_mtl.task.labels": ("labeled_part",),
    "lightning_mtl.configured": ("MultiTaskCLI", "ConfigurationError"),
    "lightning_mtl.cli": ("main",),
}
# Packages whose public names are those of the root.
AT_THE_ROOT = ("lightning_mtl.method", "lightning_mtl.task")
# What has no docstring of its own.
DATA = {
    "TaskScores": '``{task: {metric: value}}``; ``"loss"`` stands for the task\'s loss.',
    "__version__": "The version of the package, as in the metadata of its wheel.",
}
# The pages: title, modules in order. Packages that no page names get a page of their own.
PAGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "module": ("Modules, tasks and bases", ("lightning_mtl", "lightning_mtl.task.labels", "lightning_mtl.trunk")),
    "weighting": ("Weightings", ("lightning_mtl.weighting",)),
    "architectures": ("Architectures", ("lightning_mtl.architectures",)),
    "learning_rates": ("Learning rates", ("lightning_mtl.learning_rates",)),
    "control": ("Control for each task", ("lightning_mtl.control",)),
    "monitors": ("Monitors", ("lightning_mtl.monitors",)),
    "data": ("Data", ("lightning_mtl.data",)),
    "transfer": ("Did it help?", ("lightning_mtl.transfer", "lightning_mtl.metrics")),
    "finetuning": ("Fine-tuning", ("lightning_mtl.finetuning",)),
    "tuning": ("Search and command line", ("lightning_mtl.tuning", "lightning_mtl.cli", "lightning_mtl.configured")),
    "solvers": ("Solvers", ("lightning_mtl.solvers",)),
}


@dataclass(frozen=True)
class Entry:
    """One public name: where users import it from, and what it is."""

    module: str
    name: str
    value: Any

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"

    @property
    def directive(self) -> str:
        if get_origin(self.value) is not None:  # an alias such as dict[str, float]
            return "data"
        if isinstance(self.value, type):
            return "autoexception" if issubclass(self.value, BaseException) else "autoclass"
        return "autofunction" if callable(self.value) else "data"

    @property
    def summary(self) -> str:
        """The docstring's first sentence."""
        if self.directive == "data":
            return DATA[self.name]
        text = (inspect.getdoc(self.value) or "").partition("\n\n")[0]
        return " ".join(text.split())


def public_modules() -> list[str]:
    """The package, and every module below it that says by ``__all__`` what is public."""
    below = [info.name for info in pkgutil.iter_modules(lightning_mtl.__path__, "lightning_mtl.")]
    public = [name for name in below if hasattr(importlib.import_module(name), "__all__") and name not in AT_THE_ROOT]
    return ["lightning_mtl", *public]


def entries_of(module_name: str) -> list[Entry]:
    """The public names of a module, in the order of its ``__all__``."""
    module: ModuleType = importlib.import_module(module_name)
    names = WITHOUT_ALL.get(module_name) or module.__all__
    return [Entry(module_name, name, getattr(module, name)) for name in names]


def pages() -> dict[str, tuple[str, list[Entry]]]:
    """``{page: (title, entries)}``: all that the reference documents."""
    found = {page: (title, [e for m in modules for e in entries_of(m)]) for page, (title, modules) in PAGES.items()}
    placed = {module for _, modules in PAGES.values() for module in modules}
    for module in public_modules():
        if module not in placed:
            name = module.rpartition(".")[2]
            found[name] = (name.replace("_", " ").capitalize(), entries_of(module))
    return found


def paths_by_name() -> dict[str, str]:
    """``{name: path}`` of the public names that no other thing is likely to be called by."""
    found = {}
    for _, entries in pages().values():
        for entry in entries:
            if entry.name[0].isupper() or "_" in entry.name.strip("_"):
                found.setdefault(entry.name, entry.path)
    return found
