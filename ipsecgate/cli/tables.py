"""Tables that fit 80 columns and use 140, and the words that they share.

Rules of this module: nothing is cut off. A cell that is too narrow goes on in the next line, and a
long list ends with the number of what it leaves out; `--all` and `--json` show that.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TypeVar

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ipsecgate.admin.problem_document import Problem
from ipsecgate.admin.status_document import Controller

T = TypeVar("T")

WIDE = 110  # columns from which on a table has all of its columns
ROWS = 40  # of a table, unless all are wanted
LINES = 4  # of a cell, likewise
COLOURS = {
    "covered": "green",
    "partly-covered": "red",
    "negotiating": "yellow",
    "back-off": "red",
    "opens": "bold red",
    "closes": "yellow",
}


def table(*columns: str) -> Table:
    """Return a table without borders; a column whose name begins with > is aligned to the right."""
    made = Table(box=None, pad_edge=False)
    for column in columns:
        name = column.removeprefix(">")
        justify = "right" if name != column else "left"
        made.add_column(name, header_style="dim", overflow="fold", justify=justify)  # type: ignore[arg-type]
    return made


def parts(*items: RenderableType) -> Group:
    """Return parts one below the other; the first begins without the blank line of a heading."""
    top = items[0] if items else None
    if isinstance(top, Text) and top.plain.startswith("\n"):
        return Group(top[1:], *items[1:])
    return Group(*items)


def heading(text: str) -> Text:
    """Return a line above a table."""
    return Text(f"\n{text}", "bold")


def coloured(word: str) -> Text:
    """Return a state in its colour, such as `covered`; one that nothing is wrong with has none."""
    return Text(word.replace("partly-", "partly "), COLOURS.get(word, ""))


def coverage(state: str | None, last_error: str) -> Text:
    """Return a policy's coverage in its colour. One that nobody has asked for has none."""
    if state == "uncovered" and last_error:
        return Text(state, "red")
    return coloured(state or "")


def reason(name: str) -> Text:
    """Return what the hooks do with a flow, and why: `covered`, or `refused: no live SA`."""
    if name in ("allow_covered", "allow_associated"):
        return Text("covered", "green")
    result = name.partition("_")[0]
    verb, colour = _RESULTS.get(result, (result, ""))
    return Text(f"{verb}: {reason_text(name)}", colour)


def reason_text(name: str) -> str:
    """Return a reason in a few words, without the result."""
    return _REASONS.get(name, name.partition("_")[2].replace("_", " "))


_RESULTS = {
    "allow": ("allowed", ""),
    "refuse": ("refused", "red"),
    "block": ("blocked", "red"),
}
_REASONS = {
    "allow_default": "no policy names it",
    "allow_bypass": "its policy exempts it",
    "allow_passed": "a pass-through connection has it",
    "allow_exempt": "always exempt",
    "allow_other": "another instance judges it",
    "refuse_uncovered": "no live SA",
    "refuse_discard": "its policy discards it",
    "refuse_default": "no policy names it",
    "refuse_no_source": "no certain route or source",
    "refuse_not_ready": "policies not known",
    "refuse_netns": "namespace not known",
    "refuse_outside": "it would bypass the SPD",
    "block_clear": "in clear",
    "block_discard": "its policy discards it",
    "block_default": "no policy names it",
    "block_not_ready": "policies not known",
    "block_unreadable": "unreadable",
}


def two_lines(first: str | Text, second: str) -> Text:
    """Return a cell with a second, dimmer line; "": it has none."""
    text = Text(first) if isinstance(first, str) else first.copy()
    return text.append(f"\n{second}", "dim") if second else text


def problem_lines(problem: Problem, style: str) -> list[RenderableType]:
    """Return a problem, and on a line of its own what to do about it."""
    text = Text.assemble(("! ", f"bold {style}"), (problem["text"], style))
    return [text, *next_step(problem["advice"])]


def next_step(advice: str) -> list[RenderableType]:
    """Return an indented line with what to do, none for ""."""
    return [Padding.indent(Text(f"next: {advice}", "yellow"), 2)] if advice else []


def failure(about: str, error: str, advice: str) -> list[RenderableType]:
    """Return what has failed and when, and below it why, and what to do."""
    return [Text(about), Padding.indent(Text(error, "red"), 2), *next_step(advice)]


def child_name(child: str) -> str:
    """Return a child, "ike/child" or "ike/child to PART", in strongSwan's words."""
    connection, _, own = child.partition("/")
    return f"connection {connection}, child {own}"


def lines(items: Sequence[str], *, everything: bool) -> str:
    """Return a cell with an item a line; many are folded."""
    if everything or len(items) <= LINES:
        return "\n".join(items)
    return "\n".join([*items[: LINES - 1], f"and {len(items) - LINES + 1} more"])


def first(items: Sequence[T], *, everything: bool) -> Sequence[T]:
    """Return the items that a table shows."""
    return items if everything else items[:ROWS]


def left_out(items: Sequence[object], *, everything: bool) -> list[Text]:
    """Return a line about the items that `first` leaves out, if there are any."""
    rest = 0 if everything else len(items) - ROWS
    return [Text(f"and {rest} more: --all shows them", "dim")] if rest > 0 else []


def without_controller(controller: Controller, text: str) -> list[Text]:
    """Return a line that says that no controller runs, and what that means for what is shown."""
    if controller["alive"]:
        return []
    return [Text(f"The controller is not running: {text}.", "bold red")]


def ago(when: float | None) -> str:
    """Return how long ago a time was, "" for None."""
    return "" if when is None else duration(max(0.0, time.time() - when))


def left(when: float | None) -> str:
    """Return how long it is until then, "" for None."""
    return "" if when is None else duration(max(0.0, when - time.time()))


def duration(seconds: float) -> str:
    """Return seconds in the unit that suits them."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def number(count: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"
