"""The screen of `top`: what it shows (`View`), what a key changes, and how it is drawn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ipsecgate.admin.top_document import Count, Rates, Top, TopCgroup, TopPolicy
from ipsecgate.cli.tables import coverage, number
from ipsecgate.core.model.value import value

STATE = 14  # columns: partly covered
LATELY = 30.0  # seconds
WIDE = 110  # columns from which there is space for the last flow and the last error
SORTS = ("refused/s", "refused", "held", "name")
KEYS = (
    ("q", "quit"),
    ("p", "by policy"),
    ("c", "by cgroup and process"),
    ("s", f"sort by the next of {', '.join(SORTS)}"),
    ("space", "pause; once more: go on"),
    ("h", "this help"),
)
HINT = "q quit  p policies  c cgroups  s sort  space pause  h help"
NUMBERS = ("refused/s", "refused", "blocked/s", "held")


@value
class View:
    """What the screen shows."""

    by: Literal["policy", "cgroup"] = "policy"
    sort: str = SORTS[0]
    paused: bool = False
    help: bool = False

    def pressed(self, key: str) -> View:
        """Return the view after a key. Those that mean nothing change nothing."""
        if self.help:
            return replace(self, help=False)
        match key:
            case "p":
                return replace(self, by="policy")
            case "c":
                return replace(self, by="cgroup")
            case "s":
                return replace(self, sort=SORTS[(SORTS.index(self.sort) + 1) % len(SORTS)])
            case " ":
                return replace(self, paused=not self.paused)
            case "h" | "?":
                return replace(self, help=True)
        return self


def screen(
    document: Top | None, problem: str, view: View, width: int, height: int | None
) -> RenderableType:
    """Draw a document whose texts are printable; None: none could be read, `problem` says why.

    `height`: lines of the terminal, which are filled; None: draw every row, and no keys.
    """
    head = _head(document, problem, view, is_wide=width >= WIDE)
    space = None if height is None else max(0, height - len(head) - 2)  # a blank line and the keys
    body, used = _body(document, view, width, space)
    if space is not None:
        keys = Text.assemble((HINT, "dim"), f"  sorted by {view.sort}", no_wrap=True)
        body += [*[Text("")] * (space - used), keys]
    return Group(*head, Text(""), *body)


def _body(
    document: Top | None, view: View, width: int, space: int | None
) -> tuple[list[RenderableType], int]:
    """Return what is between head and keys, and how many lines it takes: `space` at most."""
    if view.help:
        lines: list[RenderableType] = [_line(f"  {key:6} {meaning}") for key, meaning in KEYS]
        return lines[:space], len(KEYS)
    if document is None:
        return [], 0
    rows = _sorted(document, view)
    if not rows:
        text = "no policy is known yet" if view.by == "policy" else "nothing is gated"
        return [_line(text)], 1
    if space is None or len(rows) < space:
        return [_table(rows, view, width)], len(rows) + 1
    shown = max(0, space - 2)  # without the header, and the line below
    more = _line(f"and {len(rows) - shown} more", "dim")
    return [_table(rows[:shown], view, width), more], shown + 2


def _line(text: str, style: str = "") -> Text:
    return Text(text, style, no_wrap=True, overflow="ellipsis")


def _head(document: Top | None, problem: str, view: View, *, is_wide: bool) -> list[Text]:
    if document is None:
        return [
            Text.assemble(("ipsecgate", "bold"), "  ", (problem, "bold red"), no_wrap=True),
            _line("trying again every few seconds", "dim"),
        ]
    state = ("controller running", "green")
    if not document["controller"]:
        state = ("controller not running: only covered flows go on", "bold red")
    mode = document["mode"]
    name = "" if document["instance"] == "default" else f" instance {document['instance']}"
    first = Text.assemble(("ipsecgate", "bold"), f"{name}  ")
    first.append(f"{mode}  ", "yellow" if mode == "audit" else "")
    first.append("paused  " if view.paused else "", "bold yellow").append(*state)
    first.no_wrap, first.overflow = True, "ellipsis"
    lines = [first, _totals(document, document["rates"])]
    lines += [_line(error["text"], "red") for error in document["errors"][:2]]
    if not is_wide:  # there is no column for it
        failed = [row for row in document["policies"] if row["last_error"]]
        lines += [_line(f"{row['policy']}: {row['last_error']}", "red") for row in failed[:2]]
    if problem:
        lines.append(_line(f"{problem}; this is older", "bold red"))
    return lines


def _totals(document: Top, rates: Rates) -> Text:
    audited = f", {_short(rates['audited'])} let through" if document["mode"] == "audit" else ""
    sas = "" if document["sas"] is None else f", {number(document['sas'], 'SA')}"
    return _line(
        f"{_short(rates['allowed'])} allowed/s ({_short(rates['covered'])} covered), "
        f"{_short(rates['refused'])} refused/s{audited}, "
        f"{_short(rates['blocked'])} packets blocked/s, {document['held']} held{sas}"
    )


def _sorted(document: Top, view: View) -> Sequence[TopPolicy] | Sequence[TopCgroup]:
    order: dict[str, Callable[[Count], tuple[float, ...]]] = {
        "refused/s": lambda row: (-_magnitude(row), -_total(row)),
        "refused": lambda row: (-_total(row),),
        "held": lambda row: (-row["held"],),
        "name": lambda _row: (),
    }
    key = order[view.sort]
    if view.by == "policy":
        return sorted(document["policies"], key=lambda row: (key(row), row["policy"] or ""))
    return sorted(document["cgroups"], key=lambda row: (key(row), _cgroup_name(row)))


def _total(row: Count) -> int:
    return (row["refused"] or 0) + (row["blocked"] or 0)


def _magnitude(row: Count) -> int:
    """Return the number of digits of a row's rate, so that rows seldom change places.

    One that was refused a moment ago counts as 1 per second: most programs try again in between.
    """
    rate = (row["refused_per_second"] or 0) + (row["blocked_per_second"] or 0)
    if rate < 1 and (rate or (row["last"] is not None and time.time() - row["last"] < LATELY)):
        return 1
    return len(str(int(rate))) if rate else 0


def _table(rows: Sequence[TopPolicy] | Sequence[TopCgroup], view: View, width: int) -> Table:
    table = Table(box=None, pad_edge=False, expand=True, header_style="dim")
    is_wide = width >= WIDE
    by_policy = view.by == "policy"
    names = ("policy", "state") if by_policy else ("unit or cgroup", "process")
    table.add_column(names[0], no_wrap=True, overflow="ellipsis", ratio=2, min_width=12)
    table.add_column(names[1], no_wrap=True, overflow="ellipsis", width=STATE)
    for name in NUMBERS:
        table.add_column(name, justify="right", no_wrap=True, width=len(name))
    table.add_column("last" if by_policy else "policy", no_wrap=True, overflow="ellipsis", width=10)
    if is_wide:
        if not by_policy:
            table.add_column("its state", no_wrap=True, width=STATE)
        table.add_column("last refused flow", no_wrap=True, overflow="ellipsis", ratio=2)
        if by_policy:
            table.add_column("why", no_wrap=True, overflow="ellipsis", ratio=3)
    for row in rows:
        cells = _policy_cells(row) if "action" in row else _cgroup_cells(row)  # type: ignore[arg-type]
        table.add_row(*cells[: len(table.columns)])
    return table


def _policy_cells(row: TopPolicy) -> list[Text | str]:
    state = row["coverage"] or row["action"] or ""
    shown = coverage(state, row["last_error"])
    name = row["policy"] if row["policy"] is not None else "(none names it)"
    return [
        name,
        shown,
        *_numbers(row),
        _ago(row["last"]),
        row["flow"],
        Text(row["last_error"], "red"),
    ]


def _cgroup_cells(row: TopCgroup) -> list[Text | str]:
    state = row["coverage"] or ""
    policy = row["policy"] or ("(none)" if row["flow"] else "")
    shown = coverage(state, row["flow"])
    last = Text(policy, shown.style), shown, row["flow"]
    return [_cgroup_name(row), row["comm"], *_numbers(row), *last]


def _cgroup_name(row: TopCgroup) -> str:
    if row["unit"]:
        return row["unit"]
    parts = row["cgroup"].split("/")
    return "/".join(parts[-2:]) if row["cgroup"] else f"removed cgroup {row['cgroup_id']}"


def _numbers(row: Count) -> list[Text | str]:
    refused, blocked = row["refused_per_second"], row["blocked_per_second"]
    return [
        Text(_short(refused), "bold red" if refused else ""),
        _short(row["refused"]),
        Text(_short(blocked), "bold red" if blocked else ""),
        Text(str(row["held"]), "yellow" if row["held"] else ""),
    ]


def _short(number: float | None) -> str:
    """Return a number in at most six characters."""
    if number is None:
        return "-"
    for unit in ("", "k", "M", "G"):
        if number < 9999.5 or unit == "G":
            is_small = number < 9.95 and number != int(number)
            return f"{number:.1f}{unit}" if is_small else f"{number:.0f}{unit}"
        number /= 1000
    return ""


def _ago(when: float | None) -> str:
    if when is None:
        return ""
    seconds = max(0.0, time.time() - when)
    for limit, size, unit in ((100, 1, "s"), (6000, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds / 86400:.0f} d ago"
