"""Tables of docs/performance.md: one row for each relay in each case, medians, spreads and ratios."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rounds import Row
from runs import ratios, spread


@dataclass(frozen=True, slots=True)
class Column:
    """A figure in a table.

    Attributes:
        name: of the figure.
        heading: for people, with the unit.
        compared: a column with its ratio to the base follows.
    """

    name: str
    heading: str
    compared: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Cases that are told by the same figures.

    Attributes:
        cases: their names; all of the benchmark where there are none.
        columns: the figures; those that no row has are left out.
        base: the relay that others are divided by.
        who: what the column of relays is headed.
    """

    cases: Sequence[str]
    columns: Sequence[Column]
    base: str
    who: str = "relay"


def lines(table: Table, rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of a table in Markdown; none where no case of it was measured."""
    here = list(dict.fromkeys(each.case for each in rows if not table.cases or each.case in table.cases))
    if not here:
        return
    columns = _known(table.columns, [each for each in rows if each.case in here])
    one = len(here) == 1 and not table.cases
    headings = [table.who] if one else ["case", table.who]
    for column in columns:
        headings += [column.heading, f"ratio to {table.base}"] if column.compared else [column.heading]
    yield row(headings)
    yield row(["---"] * len(headings))
    for case in here:
        for relay in dict.fromkeys(each.relay for each in rows if each.case == case):
            yield row([*([] if one else [case]), relay, *_cells(columns, table.base, rows, case, relay)])


def missing(table: Table, rows: Sequence[Row]) -> list[str]:
    """Return the cases that a table should have, and that were not measured."""
    here = {each.case for each in rows}
    return [case for case in table.cases if case not in here]


def _known(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    return [column for column in columns if any(column.name in each.figures for each in rows)]


def _cells(columns: Sequence[Column], base: str, rows: Sequence[Row], case: str, relay: str) -> Iterator[str]:
    for column in columns:
        value = spread(rows, case, relay, column.name)
        yield "-" if value is None else str(value)
        if column.compared:
            part = ratios(rows, column.name, (case, relay), (case, base))
            yield "-" if part is None else f"{part.median:.2f}" if relay != base else "1"


def row(cells: Sequence[str]) -> str:
    """Return a row of a table in Markdown."""
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
