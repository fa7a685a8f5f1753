"""What `wait` and `up` show on a terminal while they wait: on stderr, and gone at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ipsecgate.admin.wait import Target, Waited, cause_of, named
from ipsecgate.printable import printable_document

ROWS = 10  # targets that are shown
REFRESH = 4  # per second
COLOURS = {"covered": "green", "negotiating": "yellow", "back-off": "red", "never": "bold red"}


@contextmanager
def progress(timeout: float) -> Iterator[Callable[[Waited | None], None]]:
    """Show the state until the block ends; yield the function that is told each change."""
    began, found = time.monotonic(), list[Waited | None]()

    def draw() -> RenderableType:
        return screen(found[-1] if found else None, time.monotonic() - began, timeout)

    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    with Live(get_renderable=draw, console=console, refresh_per_second=REFRESH, transient=True):
        yield found.append


def screen(found: Waited | None, seconds: float, timeout: float) -> RenderableType:
    """Draw the state after so many seconds; None: no controller answers."""
    limit = "" if math.isinf(timeout) else f" of {round(timeout, 1):g}"
    elapsed = f"{seconds:.0f}{limit} s"
    if found is None:
        return Text(f"Waiting for the controller, {elapsed}", "dim")
    targets: list[Target] = printable_document(found["targets"])
    missing = [target for target in targets if target["state"] != "covered"]
    covered = len(targets) - len(missing)
    title = Text(f"Waiting for live SAs: {covered} of {len(targets)} covered, {elapsed}", "dim")
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for target in missing[:ROWS]:
        state = (
            target["state"] if target["state"] == "never" else target["negotiation"] or "waiting"
        )
        cause = cause_of(target).removeprefix(f"{state}, ")
        table.add_row(named(target), Text(state, COLOURS.get(state, "")), cause)
    more = len(missing) - ROWS
    return Group(title, table, *([Text(f"and {more} more", "dim")] if more > 0 else []))
