"""status: what is gated, what is covered, what was refused."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ipsecgate.admin.status import document as status_document
from ipsecgate.cli.app import App
from ipsecgate.errors import GateError
from ipsecgate.printable import printable_document

COLOURS = {
    "covered": "green",
    "negotiating": "yellow",
    "uncovered": "red",
    "back-off": "red",
}


@click.command()
@click.pass_obj
def status(app: App) -> int:
    """Show the gate: hooks, policies and their coverage, SAs, counters.

    Works with the controller dead, then with exit code 1.
    """
    try:
        document = status_document(app.paths, app.config)
    except FileNotFoundError as error:
        raise GateError(
            f"nothing is loaded for instance {app.paths.instance!r}: nothing is gated",
            hint="ipsecgate run, or ipsecgate load",
        ) from error
    if app.json:
        app.document(document)
    else:
        app.out.print(screen(printable_document(document)))
    attached = all(hook["attached"] for hook in document["hooks"])
    healthy = document["controller"]["alive"] and not document["errors"] and attached
    return 0 if healthy and document["published"] else 1


def screen(document: dict[str, Any]) -> RenderableType:
    """Draw a status document."""
    parts: list[RenderableType] = [_headline(document)]
    parts += [Text(f"  {error}", style="red") for error in document["errors"]]
    if not document["published"]:
        parts.append(
            Text("  no policy is known yet: whatever is not loopback is refused", style="red")
        )
    parts += [_hooks(document), _policies(document)]
    if document["negotiations"]:
        parts.append(_negotiations(document))
    if document["sas"]:
        parts.append(_sas(document))
    if document["holds"]:
        parts.append(_holds(document))
    parts.append(_counters(document))
    return Group(*parts)


def _headline(document: dict[str, Any]) -> Text:
    controller = document["controller"]
    line = Text.assemble(
        ("ipsecgate", "bold"), f" {document['instance']}  mode ", (document["mode"], "bold")
    )
    line.append(f"  default {document['default']}  SAs by ")
    line.append(document["sa_source"] or "whom IKE will tell", style="bold")
    line.append("  controller ")
    if controller["alive"]:
        line.append(f"running (pid {controller['pid']})", style="green")
    else:
        line.append("dead: what is covered stays covered, nothing new opens", style="bold red")
    return line


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, header_style="dim", overflow="fold")
    return table


def _hooks(document: dict[str, Any]) -> Table:
    by_cgroup: dict[str, list[str]] = {}
    for hook in document["hooks"]:
        name = hook["cgroup"] or f"removed cgroup {hook['cgroup_id']}: attach its successor"
        by_cgroup.setdefault(name, []).append(hook["hook"])
    table = _table("\ngated cgroups", "cgroup", "hooks")
    for cgroup, hooks in by_cgroup.items():
        table.add_row(cgroup, " ".join(hooks))
    if not by_cgroup:
        table.add_row(Text("none: ipsecgate attach, or cgroups in the configuration", "yellow"), "")
    return table


def _policies(document: dict[str, Any]) -> Table:
    table = _table("\npolicies", "name", "action", "remote", "child", "coverage")
    for policy in document["policies"]:
        coverage = policy["coverage"] or ""
        table.add_row(
            policy["name"],
            policy["action"],
            " ".join(policy["remote"]),
            policy["child"] or "by selector",
            Text(coverage, COLOURS.get(coverage, "")),
        )
    return table


def _negotiations(document: dict[str, Any]) -> Table:
    table = _table("\nnegotiations", "child", "state", "attempts", "for", "last error")
    for item in document["negotiations"]:
        table.add_row(
            item["child"],
            Text(item["state"], COLOURS.get(item["state"], "")),
            str(item["attempts"]),
            item["flow"],
            item["last_error"],
        )
    return table


def _sas(document: dict[str, Any]) -> Table:
    table = _table("\nSAs", "spi", "peer", "reqid", "child", "since")
    for sa in document["sas"]:
        table.add_row(
            sa["spi"], sa["peer"], str(sa["reqid"]), sa["child"] or "", _time(sa["since"])
        )
    return table


def _holds(document: dict[str, Any]) -> Table:
    table = _table("\nheld calls", "thread", "flow", "at most")
    for hold in document["holds"]:
        table.add_row(str(hold["pid"]), hold["flow"], f"{hold['limit']:.1f} s")
    return table


def _time(seconds: float | None) -> str:
    """Write a time by the operator's clock; None: VICI does not tell since when an SA is."""
    if seconds is None:
        return ""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")


def _counters(document: dict[str, Any]) -> Table:
    counters = document["counters"]
    table = _table("\nrequests", "allowed", "held", "refused", "audited", "why")
    why = ", ".join(
        f"{count} {name.split('_', 1)[1].replace('_', ' ')}"
        for name, count in counters["reasons"].items()
        if count
    )
    counts = (str(counters[name]) for name in ("allowed", "held", "refused", "audited"))
    table.add_row(*counts, why or "none")
    return table
