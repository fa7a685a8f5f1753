"""why: the decision about a flow, step by step, and the next thing to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ipsecgate.admin.event_documents import DENIED
from ipsecgate.cli import complete
from ipsecgate.cli.app import App
from ipsecgate.cli.destination import flows_to
from ipsecgate.cli.verb import verb
from ipsecgate.core.model.flow import Flow, parse_address
from ipsecgate.edges.host import control
from ipsecgate.errors import START, GateError, UsageError
from ipsecgate.printable import printable_document

if TYPE_CHECKING:
    from ipsecgate.admin.why import Caller


@verb(
    examples=[
        ("ipsecgate why", "Explain the last refusal."),
        (
            "ipsecgate why 10.2.0.5:5432",
            "Explain what happens to a connection to this address and port.",
        ),
        (
            "ipsecgate why '[2001:db8::5]:53/udp' --from 2001:db8::1",
            "Explain a datagram from a bound socket.",
        ),
        (
            "ipsecgate why db.example:5432 --container webshop",
            "Explain a connection that a container makes.",
        ),
    ]
)
@click.argument(
    "target", metavar="[HOST:PORT[/udp]]", required=False, shell_complete=complete.flows
)
@click.option(
    "--from", "source", metavar="ADDRESS", help="The address to which the socket is bound."
)
@click.option(
    "--pid",
    type=click.IntRange(1),
    metavar="PID",
    shell_complete=complete.pids,
    help="The process that calls.",
)
@click.option(
    "--cgroup",
    metavar="TARGET",
    shell_complete=complete.targets,
    help="The cgroup of the caller: a path, unit:NAME, label:KEY=VALUE or pod:NAMESPACE/NAME.",
)
@click.option(
    "--container",
    metavar="NAME",
    shell_complete=complete.containers,
    help="The container of the caller, by name or id.",
)
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
    """Explain why a flow is allowed or refused.

    Asks the code that decides, and changes nothing: nothing is sent, and nothing is
    negotiated. Without HOST:PORT, explains the last refusal. Exits with 1 if the flow is
    refused.
    """
    from ipsecgate.admin import why as decision  # noqa: PLC0415 - takes 50 ms

    if sum(option is not None for option in (pid, cgroup, container)) > 1:
        raise UsageError("use only one of --pid, --cgroup and --container")
    caller = decision.caller_of(pid, f"container:{container}" if container else cgroup)
    last = None if target else _last_refusal(app)
    flows = [_flow_of(last)] if last else flows_to(target or "", source)
    try:
        caller = caller or _caller_of(last)
        documents = [decision.why(app.paths, flow, caller, app.config) for flow in flows]
    except FileNotFoundError as error:
        raise GateError(
            f"the hooks of instance {app.paths.instance!r} are not loaded: nothing is gated",
            hint=START,
        ) from error
    if app.json:
        app.document({"last": last, "flows": documents})
    else:
        from ipsecgate.cli.why_screen import headline, screen  # noqa: PLC0415 - rich takes 25 ms

        if last:
            app.out.print(headline(printable_document(last)))
        for document in documents:
            app.out.print(screen(printable_document(document)))
    return 0 if all(document["allowed"] for document in documents) else 1


def _last_refusal(app: App) -> dict[str, Any]:
    with control.connected(app.paths.control) as ask:
        answer = ask("events", since=0)
    refusals: list[dict[str, Any]] = [r for r in answer["events"] if r["kind"] in DENIED]
    if refusals:
        last = (record for record in refusals if record["seq"] == answer["last_refusal"])
        return next(last, refusals[-1])
    raise GateError(
        "nothing was refused since the controller started",
        hint="name a flow: `ipsecgate why HOST:PORT`, and with --pid a process, to learn whether "
        "it is gated",
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
    from ipsecgate.admin.why import caller_of  # noqa: PLC0415

    try:
        return caller_of(record["pid"], None)
    except GateError:
        return None
