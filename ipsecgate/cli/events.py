"""events: what was refused, by which rule, and what the controller did about it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime
from itertools import chain
from typing import Any

import click
from rich.text import Text

from ipsecgate.cli.app import App
from ipsecgate.edges.host import control
from ipsecgate.printable import as_json, printable_document

PERIOD = 0.5  # seconds between two looks, when following
COLOURS = {"refused": "red", "blocked": "bold red", "warning": "yellow", "error": "bold red"}


@click.command()
@click.option("--follow", "-f", is_flag=True, help="Go on with what happens; --json: one a line.")
@click.option("--denied", "-d", is_flag=True, help="Only what was refused or blocked.")
@click.option("--last", "-n", type=click.IntRange(1), help="Only so many of those that are past.")
@click.pass_obj
def events(app: App, follow: bool, denied: bool, last: int | None) -> None:
    """Tell what was refused or blocked and why, and what became of it.

    One event for a flow in a tenth of a second, however often it is refused: `status` counts.
    """
    past = _since(app, 0)
    shown = [r for r in past if not denied or r["kind"] != "log"]
    shown = shown[-last:] if last else shown
    if not follow:
        if app.json:
            app.document(shown)
        else:
            for record in shown:
                app.out.print(line(record))
        return
    for record in chain(shown, _to_come(app, past[-1]["seq"] if past else 0)):
        if denied and record["kind"] == "log":
            continue
        if app.json:
            click.echo(as_json(record))
        else:
            app.out.print(line(record))


def _since(app: App, seq: int) -> list[dict[str, Any]]:
    records: list[dict[str, Any]]
    with control.connected(app.paths.control) as ask:
        records = ask("events", since=seq)["events"]
    return records


def _to_come(app: App, seq: int) -> Iterator[dict[str, Any]]:
    while True:
        time.sleep(PERIOD)
        for record in _since(app, seq):
            seq = record["seq"]
            yield record


def line(record: dict[str, Any]) -> Text:
    """Draw one event, on one line."""
    record = printable_document(record)
    when = datetime.fromtimestamp(record["time"]).astimezone()
    kind = record.get("level", record["kind"])
    text = Text.assemble(
        (f"{when:%H:%M:%S.%f}"[:-3], "dim"), "  ", (f"{kind:8}", COLOURS.get(kind, "")), " "
    )
    if record["kind"] == "log":
        return text.append(record["text"])
    text.append(record["flow"], style="bold")
    if record["pid"] is not None:
        text.append(f"  {record['comm']} ({record['pid']})")
    text.append(f"  {record['text']}")
    if record["policy"]:
        text.append(f"  policy {record['policy']}", style="dim")
    if record["audited"]:
        text.append("  let go: audit mode", style="yellow")
    return text
