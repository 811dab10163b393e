"""Prints the table of methods, which is read from their classes and docstrings."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from lightning_mtl import weighting
from lightning_mtl.method.base import Weighting
from lightning_mtl.monitors.tables import console_for_lines

LEAST_WIDTH_FOR_SUMMARIES = 110


@dataclass(frozen=True)
class Method:
    """Holds one line of the table."""

    name: str
    measures: str
    at: str
    weighs_heads: bool
    paper: str
    summary: str


def methods() -> list[Method]:
    """Describe every exported method: name, what it measures and where, whether it weighs heads, paper, summary.

    Example:
        >>> next(method for method in methods() if method.name == "MGDA").paper
        '1810.04650'
    """
    classes = [getattr(weighting, name) for name in sorted(weighting.__all__, key=str.lower)]
    return [_describe(cls) for cls in classes if isinstance(cls, type) and issubclass(cls, Weighting)]


def _describe(method: type[Weighting]) -> Method:
    text = inspect.getdoc(method) or ""
    source = text.partition("Source:")[2].partition("\n\n")[0]
    at = inspect.signature(method).parameters.get("at")
    numbers = re.findall(r"arXiv:(\d{4}\.\d{4,5})", source)
    venue = re.search(r"([A-Z]{4,}) (\d{4})", source)
    return Method(
        name=method.__name__,
        measures=method.measures,
        at="" if at is None else str(at.default),
        weighs_heads=method.weighs_heads,
        paper=numbers[-1] if len(numbers) == 1 else ", ".join(numbers) or (venue.group() if venue else ""),
        summary=text.splitlines()[0].rstrip("."),
    )


def print_methods(arguments: Sequence[str]) -> None:
    """Print the table, as wide as the terminal."""
    parser = argparse.ArgumentParser(prog="lightning-mtl methods", description="The weighting methods, one a line.")
    parser.parse_args(arguments)
    table = Table(title="Weightings: --trainer.callbacks+=NAME", title_justify="left", box=box.SIMPLE, padding=0)
    for header in ("name", "measures", "at", "heads", "paper"):
        table.add_column(header, no_wrap=True)
    console = console_for_lines()
    has_room = console.width >= LEAST_WIDTH_FOR_SUMMARIES
    if has_room:
        table.add_column("in one line")
    for method in methods():
        heads = "yes" if method.weighs_heads else "no"
        summary = [method.summary] if has_room else []
        table.add_row(method.name, method.measures, method.at, heads, method.paper, *summary)
    console.print(table)
