"""The base class of results: a table for the console and a notebook, a data frame, a file and a picture."""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_mtl.monitors.tables import Grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


class Shown(NamedTuple):
    """Holds a table with what is written above and below it."""

    grid: Grid
    title: str
    caption: str = ""


class Report(ABC):
    """Shows a result: as a table in the console, in Markdown and in notebooks, as rows of numbers, and as a picture.

    A subclass says what the table is, what the rows are, and draws the picture.

    Example:
        >>> class Sizes(Report):
        ...     def shown(self):
        ...         grid = Grid(["part", "size"])
        ...         grid.add("trunk", "1,000")
        ...         return Shown(grid, "Sizes")
        ...
        ...     def records(self):
        ...         return ["part", "size"], [("trunk", 1000)]
        ...
        ...     def figure(self):
        ...         raise NotImplementedError
        >>> print(Sizes().markdown())
        | part  |  size |
        | ----- | ----: |
        | trunk | 1,000 |
    """

    @abstractmethod
    def shown(self) -> Shown:
        """Return the table with its title and its caption."""

    @abstractmethod
    def records(self) -> tuple[Sequence[str], list[tuple[Any, ...]]]:
        """Return the names of the columns, and the rows with their values unrounded."""

    @abstractmethod
    def figure(self) -> Figure:
        """Draw the result.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """

    def table(self) -> Table:
        """Make a table of the package rich for the console; green and red are beyond noise.

        Raises:
            ModuleNotFoundError: If rich is not installed.
        """
        shown = self.shown()
        return shown.grid.rich(title=shown.title, caption=shown.caption)

    def markdown(self) -> str:
        """Write the same table in Markdown; bold is beyond noise."""
        shown = self.shown()
        return f"{shown.grid.markdown()}\n\n{shown.caption}" if shown.caption else shown.grid.markdown()

    def _repr_html_(self) -> str:
        """Write the same table for a notebook, which calls this."""
        shown = self.shown()
        return shown.grid.html(title=shown.title, caption=shown.caption)

    def to_csv(self, path: str | Path) -> None:
        """Write the rows into a file, under their columns' names."""
        columns, rows = self.records()
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *rows])

    def to_frame(self) -> Any:  # noqa: ANN401 - a DataFrame, where pandas is installed
        """Return the rows as a data frame of pandas.

        Raises:
            ModuleNotFoundError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{type(self).__name__}.to_frame() makes a data frame of pandas, which is not installed; run pip "
                "install pandas, or take to_csv(path) or records()."
            ) from error
        columns, rows = self.records()
        return pd.DataFrame(rows, columns=list(columns))
