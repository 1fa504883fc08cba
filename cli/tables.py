"""Rows of plain data as a table of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..protocol.log import printable


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Return the rows under a line of headings, each column as wide as its widest cell; numbers to the right."""
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[place]) for line in [list(columns), *cells]) for place in range(len(columns))]
    right = [all(isinstance(row.get(column), (int, float)) for row in rows) for column in columns]
    lines = [
        "  ".join(
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in [[column.upper() for column in columns], *cells]
    ]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return printable(",".join(map(str, value)))
    return printable(str(value))  # peers choose their names
