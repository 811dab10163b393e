"""Tables for the console and for TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from lightning_mtl.metrics import Interval

if TYPE_CHECKING:
    from rich.table import Table


class Cell(NamedTuple):
    """A cell's text, and whether it says something good or bad beyond noise."""

    text: str
    verdict: Literal["better", "worse", ""] = ""


class Grid:
    """A table's header and rows; the first column holds names, the others numbers.

    Example:
        >>> grid = Grid(["task", "gain"])
        >>> grid.add("age", Cell("+3", "better"))
        >>> print(grid.markdown())
        | task | gain |
        | --- | ---: |
        | age | **+3** |
    """

    def __init__(self, header: Sequence[str]) -> None:
        self.header = list(header)
        self.rows: list[list[Cell]] = []
        self.sections: set[int] = set()

    def add(self, *cells: Cell | str) -> None:
        """Add a row."""
        self.rows.append([cell if isinstance(cell, Cell) else Cell(cell) for cell in cells])

    def end_section(self) -> None:
        """Draw a line under the last row, where the table has lines."""
        self.sections.add(len(self.rows) - 1)

    def markdown(self) -> str:
        """The table in Markdown; what is beyond noise is bold."""
        lines = [[_escaped(name) for name in self.header], ["---", *["---:"] * (len(self.header) - 1)]]
        lines.extend([_in_markdown(cell) for cell in row] for row in self.rows)
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def marked(
    interval: Interval, *, lower_is_better: bool = False, sign: str = "+", beyond: bool = True, digits: int = 1
) -> Cell:
    """A mean with its interval, marked where zero lies outside of it.

    Example:
        >>> marked(Interval(2.0, 1.0, 3.0))
        Cell(text='+2.0 [+1.0, +3.0]', verdict='better')
    """
    mean, low, high = (round(value, digits) + 0.0 for value in interval)  # + 0.0 turns -0.0 into 0.0
    form = f"{sign}.{digits}f"
    if math.isnan(low):
        return Cell(f"{mean:{form}}")
    text = f"{mean:{form}} [{low:{form}}, {high:{form}}]"
    if not (beyond and interval.beyond_noise):
        return Cell(text)
    return Cell(text, "better" if (interval.mean < 0) == lower_is_better else "worse")


def rich_table(grid: Grid, *, title: str, caption: str) -> Table:
    """The table for the console: green is better, red is worse, beyond noise.

    Raises:
        ModuleNotFoundError: If rich is not installed.
    """
    try:
        from rich.table import Table
        from rich.text import Text
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The table is one of rich's, which is not installed; run pip install 'lightning-mtl[tables]'. A "
            "TransferReport has markdown(), too."
        ) from error
    colors = {"better": "green", "worse": "red", "": ""}
    table = Table(title=title, caption=caption, caption_justify="left")
    for position, name in enumerate(grid.header):
        table.add_column(Text(name), justify="right" if position else "left", no_wrap=position == 0, overflow="fold")
    for position, row in enumerate(grid.rows):
        # An interval below its mean leaves room for more columns.
        cells = [Text(cell.text.replace(" [", "\n["), style=colors[cell.verdict]) for cell in row]
        table.add_row(*cells, end_section=position in grid.sections)
    return table


def _in_markdown(cell: Cell) -> str:
    return f"**{_escaped(cell.text)}**" if cell.verdict else _escaped(cell.text)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
