"""why: the decision about a flow, step by step, and the next thing to do."""

from __future__ import annotations

import re
import socket
from typing import Any

import click
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ipsecgate.admin import why as decision
from ipsecgate.admin.why import Caller, Why, caller_of
from ipsecgate.cli.app import App
from ipsecgate.core.model.flow import TCP, UDP, Address, Flow, parse_address
from ipsecgate.edges.host import control
from ipsecgate.errors import GateError, UsageError
from ipsecgate.printable import printable, printable_document

_TARGET = re.compile(
    r"(?:\[(?P<v6>[^\]]+)\]|(?P<host>[^:\[\]/]+)):(?P<port>[0-9]{1,5})(?:/(?P<proto>tcp|udp))?"
)


@click.command()
@click.argument("target", metavar="[HOST:PORT[/udp]]", required=False)
@click.option(
    "--from", "source", metavar="ADDRESS", help="The address to which the socket is bound."
)
@click.option("--pid", type=click.IntRange(1), metavar="PID", help="The process that calls.")
@click.option("--cgroup", metavar="TARGET", help="The cgroup of the caller: a path or unit:NAME.")
@click.option("--container", metavar="NAME", help="The container of the caller, by name or id.")
@click.pass_obj
def why(
    app: App,
    *,
    target: str | None,
    source: str | None,
    pid: int | None,
    cgroup: str | None,
    container: str | None,
) -> int:
    """Explain why a flow is let go or refused.

    Asks the code that decides, and changes nothing: nothing is sent, and nothing is
    negotiated. Without HOST:PORT, explains the last refusal. Exits with 1 if the flow is
    refused.

    \b
    ipsecgate why 10.2.0.5:5432
    ipsecgate why [2001:db8::5]:53/udp --from 2001:db8::1
    ipsecgate why db.example:5432 --container webshop
    """
    if sum(option is not None for option in (pid, cgroup, container)) > 1:
        raise UsageError("use only one of --pid, --cgroup and --container")
    caller = caller_of(pid, f"container:{container}" if container else cgroup)
    last = None if target else _last_refusal(app)
    flows = [_flow_of(last)] if last else _flows(target or "", source)
    try:
        documents = [decision.why(app.paths, flow, caller or _caller_of(last)) for flow in flows]
    except FileNotFoundError as error:
        raise GateError(
            f"the hooks of instance {app.paths.instance!r} are not loaded: nothing is gated",
            hint="start the controller with `ipsecgate run`",
        ) from error
    if app.json:
        app.document({"last": last, "flows": documents})
    else:
        if last:
            app.out.print(_headline(printable_document(last)), soft_wrap=True)
        for document in documents:
            app.out.print(screen(printable_document(document)))
    return 0 if all(document["allowed"] for document in documents) else 1


def _flows(target: str, source: str | None) -> list[Flow]:
    """Return the flows that HOST:PORT/PROTOCOL names: one for each address of the host."""
    match = _TARGET.fullmatch(target)
    if match is None or not 0 < int(match["port"]) <= 0xFFFF:
        raise UsageError(
            f"{printable(target)} is not HOST:PORT or HOST:PORT/udp",
            hint="for example 10.2.0.5:5432, or [2001:db8::5]:53/udp",
        )
    saddr = None if source is None else _address(source, "--from")
    daddrs = [_address(match["v6"], "HOST")] if match["v6"] else _resolve(match["host"])
    proto = UDP if match["proto"] == "udp" else TCP
    flows = [
        Flow(daddr, proto, int(match["port"]), saddr)
        for daddr in daddrs
        if saddr is None or saddr.version == daddr.version
    ]
    if not flows:
        raise UsageError(f"--from {source} is of another address family than {target}")
    return flows


def _address(text: str, what: str) -> Address:
    try:
        return parse_address(text)
    except ValueError as error:
        raise UsageError(f"{what}: {printable(text)} is not an IPv4 or IPv6 address") from error


def _resolve(host: str) -> list[Address]:
    try:
        found = socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)
    except (OSError, UnicodeError) as error:
        raise GateError(
            f"{printable(host)} cannot be resolved: {getattr(error, 'strerror', error)}",
            hint="name an address; if the resolver itself is refused, `ipsecgate events` shows it",
        ) from error
    return list(dict.fromkeys(parse_address(str(info[4][0])) for info in found))


def _last_refusal(app: App) -> dict[str, Any]:
    with control.connected(app.paths.control) as ask:
        answer = ask("events", since=0)
    refusals: list[dict[str, Any]] = [r for r in answer["events"] if r["kind"] != "log"]
    if refusals:
        last = (record for record in refusals if record["seq"] == answer["last_refusal"])
        return next(last, refusals[-1])
    raise GateError(
        "nothing was refused since the controller started",
        hint="name a flow: `ipsecgate why HOST:PORT`",
    )


def _flow_of(record: dict[str, Any]) -> Flow:
    source = record["source"]
    return Flow(
        parse_address(record["daddr"]),
        record["proto"],
        record["dport"],
        None if source is None else parse_address(source),
        record["sport"],
        record["mark"],
        record["device"],
        record["netns"],
    )


def _caller_of(record: dict[str, Any] | None) -> Caller | None:
    """Return the process of a refusal, None if it has ended or is unknown."""
    if record is None or record["pid"] is None:
        return None
    try:
        return caller_of(record["pid"], None)
    except GateError:
        return None


def _headline(record: dict[str, Any]) -> Text:
    process = f" of {record['comm']} ({record['pid']})" if record["pid"] else ""
    policy = f", policy {record['policy']}" if record["policy"] else ""
    return Text(f"Last {record['kind']}{process}: {record['text']}{policy}. Now:\n", "dim")


def screen(document: Why) -> Group:
    """Draw a document whose texts are printable."""
    source = f" from {document['source']}" if document["source"] else ""
    state, colour = ("allowed", "green") if document["allowed"] else ("refused", "red")
    if document["error"]:
        state += f" ({document['error']})"
    if not document["allowed"] and document["mode"] == "audit":
        state, colour = f"{state}, but let through in audit mode", "yellow"
    title = Text.assemble(
        (f"{document['flow']}{source}", "bold"), " is ", (state, colour), f": {document['text']}"
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
