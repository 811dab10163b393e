"""Writes tables for the console, for TensorBoard, for notebooks and as plain text."""

from __future__ import annotations

import html
import math
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from lightning_mtl.metrics import Interval

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PIPED_WIDTH = 180


class Cell(NamedTuple):
    """Holds a cell's text, and whether it is better or worse beyond noise."""

    text: str
    verdict: Literal["better", "worse", ""] = ""


class Grid:
    """Collects a table's rows and writes them for the console, as Markdown or as plain text.

    Args:
        header: The columns' names.
        left: The columns that are aligned to the left; the others hold numbers.

    Example:
        >>> grid = Grid(["task", "gain"])
        >>> grid.add("age", Cell("+3", "better"))
        >>> print(grid.markdown())
        | task |   gain |
        | ---- | -----: |
        | age  | **+3** |
    """

    def __init__(self, header: Sequence[str], left: Container[int] = (0,)) -> None:
        self.header, self.left = list(header), left
        self.rows: list[list[Cell]] = []
        self.sections: set[int] = set()

    def add(self, *cells: Cell | str) -> None:
        """Add a row."""
        self.rows.append([cell if isinstance(cell, Cell) else Cell(cell) for cell in cells])

    def end_section(self) -> None:
        """Draw a line under the last row, where the table has lines."""
        self.sections.add(len(self.rows) - 1)

    def text(self) -> str:
        """Write the table as plain text with aligned columns."""
        lines = [self.header, *([cell.text for cell in row] for row in self.rows)]
        return "\n".join("  ".join(line) for line in self._aligned(lines))

    def markdown(self) -> str:
        """Write the table in Markdown with aligned columns; what is beyond noise is bold."""
        lines = [[_escaped(name) for name in self.header], *([_in_markdown(cell) for cell in row] for row in self.rows)]
        head, *rows = self._aligned(lines)
        rule = ["-" * len(name) if i in self.left else "-" * (len(name) - 1) + ":" for i, name in enumerate(head)]
        return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))

    def html(self, *, title: str, caption: str) -> str:
        """Write the table for a notebook, in its own fonts and colors; green is better beyond noise, red is worse."""
        head = "".join(self._html_cell("th", place, Cell(name)) for place, name in enumerate(self.header))
        body = ""
        for position, row in enumerate(self.rows):
            line = "border-bottom: 1px solid currentColor" if position in self.sections else ""
            cells = "".join(self._html_cell("td", place, cell) for place, cell in enumerate(row))
            body += f'<tr style="{line}">{cells}</tr>'
        return (
            f'<table><caption style="text-align: left"><b>{html.escape(title)}</b></caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{html.escape(caption)}</p>"
        )

    def _html_cell(self, tag: str, place: int, cell: Cell) -> str:
        side = "left" if place in self.left else "right"
        color = {"better": "; color: green", "worse": "; color: red", "": ""}[cell.verdict]
        return f'<{tag} style="text-align: {side}{color}">{html.escape(cell.text)}</{tag}>'

    def _aligned(self, lines: Sequence[Sequence[str]]) -> list[list[str]]:
        widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]  # Markdown's rules need 2 or more
        return [
            [cell.ljust(width) if i in self.left else cell.rjust(width) for i, (cell, width) in enumerate(pairs)]
            for pairs in (zip(line, widths, strict=True) for line in lines)
        ]

    def rich(self, *, title: str, caption: str) -> Table:
        """Make the table of the package rich: green is better beyond noise, red is worse.

        Raises:
            ModuleNotFoundError: If rich is not installed.
        """
        try:
            from rich.table import Table
            from rich.text import Text
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "The table is one of rich's, which is not installed; run pip install rich, or take markdown()."
            ) from error
        colors = {"better": "green", "worse": "red", "": ""}
        table = Table(title=title, caption=caption, caption_justify="left")
        for i, name in enumerate(self.header):
            justify: Literal["left", "right"] = "left" if i in self.left else "right"
            table.add_column(Text(name), justify=justify, no_wrap=i == 0, overflow="fold")
        for position, row in enumerate(self.rows):
            # An interval below its mean leaves room for more columns.
            cells = [Text(cell.text.replace(" [", "\n["), style=colors[cell.verdict]) for cell in row]
            table.add_row(*cells, end_section=position in self.sections)
        return table


def _in_markdown(cell: Cell) -> str:
    return f"**{_escaped(cell.text)}**" if cell.verdict else _escaped(cell.text)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def marked(
    interval: Interval, *, lower_is_better: bool = False, sign: str = "+", beyond: bool = True, digits: int = 1
) -> Cell:
    """Write a mean with its interval, a dash where there is none, and mark it where zero lies outside of the interval.

    Example:
        >>> marked(Interval(2.0, 1.0, 3.0))
        Cell(text='+2.0 [+1.0, +3.0]', verdict='better')
    """
    if math.isnan(interval.mean):
        return Cell("–")
    mean, low, high = (round(value, digits) + 0.0 for value in interval)  # + 0.0 turns -0.0 into 0.0
    form = f"{sign}.{digits}f"
    if math.isnan(low):
        return Cell(f"{mean:{form}}")
    text = f"{mean:{form}} [{low:{form}}, {high:{form}}]"
    if not (beyond and interval.beyond_noise):
        return Cell(text)
    return Cell(text, "better" if (interval.mean < 0) == lower_is_better else "worse")


def console_for_lines(console: Console | None = None) -> Console:
    """Widen the console, or a new one, where its output is piped, so that each row stays one line for grep."""
    from rich.console import Console

    console = console or Console()
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    return console
