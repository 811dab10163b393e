"""Modules, data and Trainers made from configurations: what the command line and searches have in common."""

from lightning_mtl.configured.command_line import MultiTaskCLI
from lightning_mtl.configured.problems import ConfigurationError

__all__ = ["ConfigurationError", "MultiTaskCLI"]
