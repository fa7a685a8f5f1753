"""Put measured tables into a document, between the markers of each part.

    <!-- bench: hot_path -->
    ...
    <!-- end of hot_path -->

Nothing else in the document changes. The same reports give the same text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.parts import Part
from bench.report import Report, Row, Value
from bench.tables import grids, markdown, number


def markers(name: str) -> tuple[str, str]:
    """Return the lines before and after the tables of a part."""
    return f"<!-- bench: {name} -->\n", f"<!-- end of {name} -->\n"


def words(machine: Mapping[str, Value]) -> str:
    """Return a machine's description."""
    count = machine["processors"]
    processors = f"{count} processor{'' if count == 1 else 's'}"
    return f"{machine['cpu']}, {processors}, Linux {machine['kernel']}"


def conditions(reports: Sequence[Report]) -> str:
    """Return a sentence about the machine, and its load before the first run if that is known."""
    machine, settings = reports[0].machine, reports[0].settings
    guest = f", a guest on {settings['host']}" if "host" in settings else ""
    load = number(float(settings.get("load before", machine["load"])))
    return f"Measured on: {words(machine)}{guest}; the load before it was {load}."


def tables(part: Part, rows: Sequence[Row]) -> list[str]:
    """Return a part's tables in Markdown."""
    return [markdown(made) for made in grids(rows, part.layouts)]


def section(part: Part, reports: Sequence[Report], rows: Sequence[Row]) -> str:
    """Return all that stands between a part's markers."""
    return "\n".join(["", *tables(part, rows), f"{conditions(reports)}\n", ""])


def put_into(document: Path, sections: Mapping[str, str]) -> None:
    """Replace sections of a document, by the part's name. Raises: ValueError without markers."""
    text = document.read_text()
    for name, content in sections.items():
        begin, end = markers(name)
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"{document} has no place for {name}: {begin}{end}")
        text = head + begin + content + end + tail
    document.write_text(text)
