"""Events, drawn for people: a receipt is one line if it fits, else some indented ones below it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.text import Text

from ipsecgate.printable import printable_document

COLOURS = {
    "refused": "red",
    "blocked": "bold red",
    "covered": "green",
    "warning": "yellow",
    "error": "bold red",
}
KIND = 8  # columns
OTHERS = {
    "flow": "",
    "program": "and other flows of the same program",
    "all": "and other flows of many programs",
}

Record = Mapping[str, Any]


def drawn(record: Record, width: int | None, now: float | None = None) -> Text:
    """Draw a record. `width`: see `width_of`. `now`: seconds of the wall clock."""
    record = printable_document(record)
    when = clock(record["time"], time.time() if now is None else now)
    kind = record.get("level", record["kind"])
    head = Text.assemble((when, "dim"), "  ", (f"{kind:{KIND}}", COLOURS.get(kind, "")), "  ")
    return _laid_out(head, list(_parts(record)), width)


def clock(at: float, now: float) -> str:
    """Return a time of the wall clock, with the date unless it is today's."""
    when, today = datetime.fromtimestamp(at), datetime.fromtimestamp(now)
    if when.date() == today.date():
        return f"{when:%H:%M:%S.%f}"[:-3]
    return f"{when:%b %d %H:%M:%S}"


def _parts(record: Record) -> Iterable[Text]:
    """Yield what there is to say, in parts that are not broken if they fit on a line."""
    match record["kind"]:
        case "log":
            yield Text(record["text"])
        case "again" | "covered":
            yield Text(record["flow"], "bold")
            yield Text(record["text"].removeprefix("again, "))  # the kind says that
        case _:
            yield from _receipt(record)


def _receipt(record: Record) -> Iterable[Text]:
    yield Text(record["flow"], "bold")
    if record["scope"] != "flow":
        yield Text(OTHERS[record["scope"]])
    place = record["container"] or record["unit"] or record["cgroup"]
    if record["comm"]:
        where = f" in {place}" if place else ""
        yield Text(f"{record['comm']} ({record['pid']}){where}")
    elif place:
        yield Text(f"in {place}")
    yield Text(record["text"])
    if record["policy"]:
        yield Text(f"policy {record['policy']} ({record['origin']})", "dim")
    if record["cause"]:
        child = f"{record['child']}: " if record["child"] else ""
        yield Text(f"{child}{record['cause']}", "yellow")
    if record["audited"]:
        yield Text("let through: audit mode", "yellow")
    if record["count"] > 1:
        yield Text(f"{record['count']:,} times, last {clock(record['last'], record['time'])}")
    if record["covered_after"] is not None:
        yield Text(_covered(record), "green")


def _covered(record: Record) -> str:
    seconds = record["covered_after"]
    after = f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
    by = f" by {record['child']}" if record["child"] else ""
    return f"covered after {after}{by}" + (f", SPI {record['spi']}" if record["spi"] else "")


def _laid_out(head: Text, parts: list[Text], width: int | None) -> Text:
    """Put parts beside a head, as many on a line as fit; those that are too long are wrapped.

    The first part is what the others are about.
    """
    if width is None:
        first, *others = parts
        return _joined(head.append_text(first), Text("; ").join(others), "  ")
    indent = head.cell_len
    room = max(width - indent, 20)
    lines: list[Text] = []
    is_full = True  # whether the last line takes no more
    for part in parts:
        between = "  " if len(lines) == 1 and part is parts[1] else "; "
        if not is_full and lines[-1].cell_len + len(between) + part.cell_len <= room:
            _joined(lines[-1], part, between)
            continue
        # In a line of its own, so that what is joined to it does not get its style.
        lines += Text().append_text(part).wrap(Console(width=room), room)
        is_full = part.cell_len > room
    for line in lines:
        line.rstrip()
    return head.append_text(Text("\n" + " " * indent).join(lines))


def _joined(text: Text, more: Text, between: str) -> Text:
    """Append to a text, and return it."""
    return text.append(between).append_text(more) if more else text
