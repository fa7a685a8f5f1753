"""events: what was refused, by which policy, and what the controller did about it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime
from itertools import chain
from typing import Any

import click
from rich.text import Text

from ipsecgate.cli.app import App
from ipsecgate.cli.verb import verb
from ipsecgate.edges.host import control
from ipsecgate.printable import as_json, printable_document

PERIOD = 0.5  # seconds between two polls of --follow
COLOURS = {"refused": "red", "blocked": "bold red", "warning": "yellow", "error": "bold red"}


@verb(
    examples=[
        ("ipsecgate events --denied --last 20", "Show the last 20 refusals."),
        ("ipsecgate events --follow", "Show new events as they happen."),
        ("ipsecgate --json events --follow", "Print one JSON object a line, for a script."),
    ]
)
@click.option(
    "--follow", "-f", is_flag=True, help="Keep printing new events; with --json one per line."
)
@click.option("--denied", "-d", is_flag=True, help="Show only refused calls and blocked packets.")
@click.option(
    "--last",
    "-n",
    type=click.IntRange(1),
    metavar="NUMBER",
    help="Of the past events show only the last NUMBER.",
)
@click.pass_obj
def events(app: App, follow: bool, denied: bool, last: int | None) -> None:
    """Show what was refused or blocked, and why.

    The controller's log messages are among the events. An event that repeats is recorded once,
    and then once a minute with its number, such as "again, 599 times in 60 s"; the counters of
    `ipsecgate status` count every refusal.
    """
    past = _since(app, 0)
    shown = [r for r in past if not denied or r["kind"] != "log"]
    shown = shown[-last:] if last else shown
    if not follow:
        if app.json:
            app.document(shown)
        else:
            for record in shown:
                app.out.print(line(record), soft_wrap=True)
        return
    for record in chain(shown, _new(app, past[-1]["seq"] if past else 0)):
        if denied and record["kind"] == "log":
            continue
        if app.json:
            click.echo(as_json(record))
        else:
            app.out.print(line(record), soft_wrap=True)


def _since(app: App, seq: int) -> list[dict[str, Any]]:
    """Return the recorded events that follow number `seq`; 0: all of them."""
    records: list[dict[str, Any]]
    with control.connected(app.paths.control) as ask:
        records = ask("events", since=seq)["events"]
    return records


def _new(app: App, seq: int) -> Iterator[dict[str, Any]]:
    """Yield the events that follow number `seq`, for ever."""
    while True:
        time.sleep(PERIOD)
        for record in _since(app, seq):
            seq = record["seq"]
            yield record


def line(record: dict[str, Any]) -> Text:
    """Draw one event on one line."""
    record = printable_document(record)
    when = datetime.fromtimestamp(record["time"]).astimezone()
    kind = record.get("level", record["kind"])
    text = Text.assemble(
        (f"{when:%H:%M:%S.%f}"[:-3], "dim"), "  ", (f"{kind:8}", COLOURS.get(kind, "")), " "
    )
    if record["kind"] == "log":
        return text.append(record["text"])
    process = "" if record["pid"] is None else f"{record['comm']} ({record['pid']})"
    text.append(f"{record['flow']:22}", style="bold")
    text.append(f"  {process:16}  {record['text']}")
    if record["policy"]:
        text.append(f"  policy {record['policy']}", style="dim")
    if record["audited"]:
        text.append("  let through: audit mode", style="yellow")
    return text
