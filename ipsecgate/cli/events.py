"""events: what was refused, by which policy, and what the controller did about it."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import click

from ipsecgate.admin.event_documents import DENIED
from ipsecgate.cli import complete
from ipsecgate.cli.app import App
from ipsecgate.cli.messages import width_of
from ipsecgate.cli.verb import verb
from ipsecgate.edges.host import control
from ipsecgate.errors import NoControllerError, UsageError
from ipsecgate.printable import as_json, printable

log = logging.getLogger("ipsecgate")

PERIOD = 0.5  # seconds between two polls of --follow
NEWS = ("again", "covered")  # of a receipt, which says the same
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}  # seconds
_AGO = re.compile(r"(\d+(?:\.\d+)?)([smhd])")

Record = Mapping[str, Any]
Wanted = Callable[[Record], bool]


@verb(
    examples=[
        ("ipsecgate events --denied --since 10m", "Show the refusals of the last ten minutes."),
        (
            "ipsecgate events --follow --unit webshop",
            "Show what happens to a unit, as it happens.",
        ),
        ("ipsecgate --json events --follow", "Print one JSON object a line, for a script."),
    ]
)
@click.option(
    "--follow", "-f", is_flag=True, help="Keep printing new events; with --json one per line."
)
@click.option("--denied", "-d", is_flag=True, help="Show only refused calls and blocked packets.")
@click.option(
    "--since",
    "-s",
    metavar="TIME",
    help="Show only what happened since then: 90s, 10m, 2h, 1d ago, or 2031-05-04T13:00.",
)
@click.option(
    "--unit",
    "-u",
    metavar="NAME",
    shell_complete=complete.units,
    help="Show only this systemd unit or container.",
)
@click.option(
    "--policy",
    "-p",
    metavar="NAME",
    shell_complete=complete.policies,
    help="Show only this policy.",
)
@click.option(
    "--last",
    "-n",
    type=click.IntRange(1),
    metavar="NUMBER",
    help="Of the past events show only the last NUMBER.",
)
@click.pass_obj
def events(
    app: App,
    *,
    follow: bool,
    denied: bool,
    since: str | None,
    unit: str | None,
    policy: str | None,
    last: int | None,
) -> None:
    """Show what was refused or blocked, and why.

    Each refusal has a receipt: process, unit or container, flow, policy and its file, the
    reason, what IKE said, and how long it took until an SA protected the flow. Repeats
    share a receipt, which counts them; if one program asks for very many flows, the later
    ones share one, too. The controller's log messages are among the events.
    """
    begin = 0.0 if since is None else moment(since, time.time())
    wanted = wish(denied=denied, since=begin, unit=unit, policy=policy)
    draw = _drawing(app)
    answer = _ask(app, 0)
    past = answer["events"]
    shown = [record for record in past if wanted(record)]
    if not follow:
        shown = [record for record in shown if record["kind"] not in NEWS]
    if not (follow or app.json):
        shown = _once(shown)
    shown = shown[-last:] if last else shown
    if app.json and not follow:
        app.document(shown)
        return
    for record in shown:
        draw(record)
    for record in _later(app, answer) if follow else ():
        if wanted(record):
            draw(record)


def _once(records: Sequence[Record]) -> list[Record]:
    """Leave out the failures of a negotiation that a receipt names as its cause."""
    causes = {(one["child"], one["cause"]) for one in records if one["kind"] in DENIED}
    return [one for one in records if one["kind"] != "log" or _failure(one) not in causes]


def _failure(message: Record) -> tuple[str, str] | None:
    """Return the child whose negotiation failed, and the cause; None: it says something else."""
    fields = message["fields"]
    return (fields["child"], fields["cause"]) if fields.get("event") == "failed" else None


def moment(text: str, now: float) -> float:
    """Return the time that an option names, in seconds of the wall clock. Raises: UsageError."""
    ago = _AGO.fullmatch(text)
    if ago:
        return now - float(ago[1]) * _UNITS[ago[2]]
    try:
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError, OSError):
        raise UsageError(
            f"--since {printable(text)} is neither a duration nor a time",
            hint="write 90s, 10m, 2h or 1d, or a time such as 2031-05-04T13:00",
        ) from None


def wish(*, denied: bool, since: float, unit: str | None, policy: str | None) -> Wanted:
    """Return whether a record is to be shown. Of a receipt, the last refusal counts for `since`."""

    def wanted(record: Record) -> bool:
        about = record.get("fields", record)
        return (
            (not denied or record["kind"] in (*DENIED, *NEWS))
            and record.get("last", record["time"]) >= since
            and (unit is None or _is_of(about, unit))
            and (policy is None or about.get("policy") == policy)
        )

    return wanted


def _is_of(about: Record, name: str) -> bool:
    """Return whether a record is about a unit or container of this name."""
    unit, container = about.get("unit") or "", about.get("container")
    return name in (unit, unit.removesuffix(".service"), container)


def _ask(app: App, seq: int) -> dict[str, Any]:
    """Return the recorded events that follow number `seq`, 0: all of them, and whose they are."""
    with control.connected(app.paths.control) as ask:
        return ask("events", since=seq)


def _later(app: App, answer: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the events after an answer, for ever: also those of the next controller."""
    seq, pid, missing = _newest(answer, 0), answer["pid"], False
    while True:
        time.sleep(PERIOD)
        try:
            answer = _ask(app, seq)
            if answer["pid"] != pid:  # its numbers began again
                pid, answer = answer["pid"], _ask(app, 0)
        except NoControllerError as error:
            if not missing:
                log.warning("%s; waiting for the next one", error)
            missing = True
            continue
        missing, seq = False, _newest(answer, seq)
        yield from answer["events"]


def _newest(answer: Mapping[str, Any], seq: int) -> int:
    """Return the number of the last event in an answer, `seq` if there is none."""
    return int(answer["events"][-1]["seq"]) if answer["events"] else seq


def _drawing(app: App) -> Callable[[Record], None]:
    """Return what prints a record."""
    if app.json:
        return lambda record: click.echo(as_json(record))
    from ipsecgate.cli.event_lines import drawn  # noqa: PLC0415 - `--json` needs no rich

    width = width_of(app.out)
    return lambda record: app.out.print(drawn(record, width), soft_wrap=True)
