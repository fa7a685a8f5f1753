"""Draw the decision about a flow, and the next thing to do."""

from __future__ import annotations

import errno
import os
import time
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ipsecgate.admin.why import Why
from ipsecgate.cli.event_lines import clock


def headline(record: dict[str, Any]) -> Text:
    """Draw the record of a refusal; its texts are printable."""
    what = "refusal" if record["kind"] == "refused" else "blocked packet"
    process = f"{record['comm']} ({record['pid']}), " if record["pid"] else ""
    policy = f", policy {record['policy']}" if record["policy"] else ""
    when = clock(record["last"], time.time())
    return Text(f"Last {what}: {process}{when}{policy}: {record['text']}. Now:\n", "dim")


def screen(document: Why) -> Group:
    """Draw a document whose texts are printable."""
    source = f" from {document['source']}" if document["source"] else ""
    state, colour = ("allowed", "green") if document["allowed"] else ("refused", "red")
    if document["error"]:
        state += f' ({document["error"]}, "{os.strerror(getattr(errno, document["error"]))}")'
    if not document["allowed"] and document["mode"] == "audit":
        state, colour = f"{state}, but let through in audit mode", "yellow"
    assumed = document["gated"] is None and not document["allowed"]
    whose = " of a gated process is " if assumed else " is "
    title = Text.assemble(
        (f"{document['flow']}{source}", "bold"), whose, (state, colour), f": {document['text']}"
    )
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    before = ""
    for step in document["steps"]:
        table.add_row("" if step["step"] == before else step["step"], step["text"])
        before = step["step"]
    if document["advice"]:
        table.add_row("next", Text(document["advice"], "yellow"))
    return Group(title, table)
