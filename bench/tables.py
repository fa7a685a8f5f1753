"""Turn reports into tables: for the terminal with rich, for the documentation in Markdown.

A `Layout` says which rows of a report make a table, which of their properties go down and which
across. The properties of a row are the keys of its `of`, and "name" for its name and unit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.report import Report, Row, Value

NAME = "name"
UNITS = {"us": "µs"}
SECONDS = 10_000  # milliseconds from which a cell shows seconds


@dataclass(frozen=True)
class Layout:
    """One table. `names`: those of the rows that it shows, in order; empty for all of them.

    `down`, `across`: properties of rows; no `down` means all keys but those of `across`. `spread`:
    show the quartiles, too. `where`: only rows with one of these values for each key. `keys`: only
    rows with exactly these keys; None for all. `lead`: a property that each cell begins with.
    `tail`: show the 99th percentile, too.
    """

    names: tuple[str, ...] = ()
    down: tuple[str, ...] = ()
    across: tuple[str, ...] = (NAME,)
    spread: bool = True
    where: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    keys: tuple[str, ...] | None = None
    lead: str = ""
    tail: bool = False

    def shows(self, row: Row) -> bool:
        """Return whether a row belongs to the table."""
        named = not self.names or row.name in self.names
        keyed = self.keys is None or self.keys == tuple(row.of)
        return (
            named and keyed and all(row.of.get(key) in values for key, values in self.where.items())
        )


@dataclass(frozen=True)
class Grid:
    """A table as text."""

    head: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    labels: int  # the first columns are text, the others numbers


def number(value: float) -> str:
    """Return a number with three significant digits, or as a whole number from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def unit(row: Row) -> str:
    """Return the unit as it is written."""
    return UNITS.get(row.unit, row.unit)


def value(row: Row, key: str) -> str:
    """Return a property of a row as text, "" if it lacks it."""
    if key == NAME:
        return f"{row.name}, {unit(row)}" if row.unit else row.name
    found = row.of.get(key, "")
    return found if isinstance(found, str) else f"{found:,}"


def heading(row: Row, keys: Sequence[str]) -> str:
    """Return the heading of a row's column; numbers stand before what they count."""
    counted = (isinstance(row.of.get(key), int | float) for key in keys)
    words = (
        f"{value(row, k)} {k}" if n else value(row, k) for k, n in zip(keys, counted, strict=True)
    )
    return ", ".join(filter(None, words)) or "median"


def cell(row: Row, layout: Layout, with_unit: bool) -> str:
    """Return a row's median, and its quartiles if they differ from it."""
    if with_unit and row.unit == "ms" and row.median >= SECONDS:
        row = replace(row, unit="s", samples=tuple(sample / 1000 for sample in row.samples))
    low, middle, high = map(number, (row.quartiles[0], row.median, row.quartiles[1]))
    text = f"{middle} {unit(row)}".rstrip() if with_unit else middle
    if layout.spread and not low == middle == high:
        worst = f"; 99 of 100 below {number(row.percentile(99))}" if layout.tail else ""
        text = f"{text} ({low} to {high}{worst})"
    return f"{value(row, layout.lead)}: {text}" if layout.lead else text


def grid(rows: Iterable[Row], layout: Layout) -> Grid:
    """Arrange rows as a layout says; columns and lines are in the order in which rows come."""
    shown = [row for row in rows if layout.shows(row)]
    if layout.names:
        shown.sort(key=lambda row: layout.names.index(row.name))
    keys = dict.fromkeys(key for row in shown for key in row.of)
    down = layout.down or tuple(key for key in keys if key not in layout.across)
    with_unit = NAME not in layout.across and NAME not in down
    columns = dict.fromkeys(heading(row, layout.across) for row in shown)
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in shown:
        line = lines.setdefault(tuple(value(row, key) for key in down), {})
        at, text = heading(row, layout.across), cell(row, layout, with_unit)
        line[at] = f"{line[at]}; {text}" if at in line else text
    names = ("measured" if key == NAME else key for key in down)
    body = tuple((*key, *(line.get(at, "") for at in columns)) for key, line in lines.items())
    return Grid((*names, *columns), body, len(down))


def markdown(made: Grid) -> str:
    """Return a table in Markdown; numbers are aligned to the right."""
    rule = ["---" if at < made.labels else "---:" for at in range(len(made.head))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (made.head, rule, *made.lines))


def screen(made: Grid, title: str) -> None:
    """Print a table."""
    table = Table(title=title)
    for at, name in enumerate(made.head):
        table.add_column(name, justify="left" if at < made.labels else "right")
    for line in made.lines:
        table.add_row(*line)
    # Without a terminal rich would assume 80 columns and break every cell.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def layouts_for(rows: Iterable[Row]) -> list[Layout]:
    """Return one layout for each set of keys that rows have, for a report without its own.

    What there is more of goes down, names or values. Rows without keys make a list.
    """
    sets: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        sets.setdefault(tuple(row.of), []).append(row)
    found = []
    for keys, alike in sets.items():
        names = len({row.name for row in alike})
        values = len({tuple(row.of.values()) for row in alike})
        if not keys:
            found.append(Layout(down=(NAME,), across=(), keys=keys))
        elif names > values:
            found.append(Layout(down=(NAME,), across=keys, keys=keys))
        else:
            found.append(Layout(down=keys, keys=keys))
    return found


def show(title: str, rows: Sequence[Row], layouts: Sequence[Layout] = ()) -> None:
    """Print rows as tables; those without a line are left out."""
    for made in grids(rows, layouts):
        screen(made, title)


def grids(rows: Sequence[Row], layouts: Sequence[Layout] = ()) -> list[Grid]:
    """Return the tables of these layouts, or of those that fit the rows, if they have a line."""
    made = [grid(rows, layout) for layout in layouts or layouts_for(rows)]
    return [one for one in made if one.lines]


def publish(report: Report, path: Path | None) -> None:
    """Print what a benchmark measured, and write it to `path`, if any. Raises: OSError."""
    if path is not None:
        report.write(path)
    show(report.title, report.rows)
