"""The status document, drawn as tables."""

from __future__ import annotations

from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ipsecgate.admin.status_document import (
    Counters,
    Hold,
    Hook,
    Namespace,
    Negotiation,
    Policy,
    Sa,
    Status,
)

COLOURS = {
    "covered": "green",
    "negotiating": "yellow",
    "uncovered": "red",
    "back-off": "red",
}


def screen(document: Status) -> RenderableType:
    """Draw a status document whose texts are printable."""
    parts: list[RenderableType] = [
        _summary(document),
        _hooks(document["hooks"]),
        _policies(document["policies"]),
    ]
    if document["negotiations"]:
        parts.append(_negotiations(document["negotiations"]))
    if document["sas"]:
        parts.append(_sas(document["sas"]))
    if document["holds"]:
        parts.append(_holds(document["holds"]))
    if document["namespaces"]:
        parts.append(_namespaces(document["namespaces"]))
    parts.append(_counters(document["counters"]))
    return Group(*parts)


def _summary(document: Status) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("Instance", document["instance"])
    table.add_row("Mode", f"{document['mode']}, default {document['default']}")
    tables = document["hook_tables"]
    table.add_row(
        "Hook tables",
        f"{tables['policy_entries']} policy entries in {tables['policy_masks']} masks, "
        f"{tables['spd_entries']} SPD entries in {tables['spd_masks']}; "
        f"{tables['memory'] / (1 << 20):.1f} MiB",
    )
    table.add_row("SA source", document["sa_source"] or "not known until strongSwan answers")
    controller = document["controller"]
    if controller["alive"]:
        table.add_row("Controller", Text(f"running, pid {controller['pid']}", "green"))
    else:
        text = "not running: covered flows go on, all other protected flows are refused"
        table.add_row("Controller", Text(text, "bold red"))
    if not document["published"]:
        text = "none yet: all traffic is refused, except to loopback addresses"
        table.add_row("Policies", Text(text, "red"))
    for number, error in enumerate(document["errors"]):
        table.add_row("" if number else "Errors", Text(error, "red"))
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(
        title=f"\n{title}", title_justify="left", title_style="bold", box=None, pad_edge=False
    )
    for column in columns:
        table.add_column(column, header_style="dim", overflow="fold")
    return table


def _hooks(hooks: list[Hook]) -> Table:
    by_cgroup: dict[str, list[str]] = {}
    for hook in hooks:
        name = hook["cgroup"] or f"removed cgroup {hook['cgroup_id']}: attach its successor"
        by_cgroup.setdefault(name, []).append(hook["hook"])
    table = _table("Gated cgroups", "Cgroup", "Hooks")
    for cgroup, names in by_cgroup.items():
        table.add_row(cgroup, " ".join(names))
    if not by_cgroup:
        text = "none: run `ipsecgate attach`, or set gate.cgroups in the configuration"
        table.add_row(Text(text, "yellow"), "")
    return table


def _policies(policies: list[Policy]) -> Table:
    table = _table("Policies", "Name", "Action", "Remote", "Child", "Coverage")
    for policy in policies:
        coverage = policy["coverage"] or ""
        table.add_row(
            policy["name"],
            policy["action"],
            " ".join(policy["remote"]),
            policy["child"] or "by selector",
            Text(coverage, COLOURS.get(coverage, "")),
        )
    if not policies:
        table.add_row(Text("none known", "yellow"))
    return table


def _negotiations(negotiations: list[Negotiation]) -> Table:
    table = _table("Negotiations", "Child", "State", "Attempts", "Flow", "Last error")
    for item in negotiations:
        table.add_row(
            item["child"],
            Text(item["state"], COLOURS.get(item["state"], "")),
            str(item["attempts"]),
            item["flow"],
            item["last_error"],
        )
    return table


def _sas(sas: list[Sa]) -> Table:
    table = _table("SAs", "SPI", "Peer", "Reqid", "Child", "Since")
    for sa in sas:
        since = "" if sa["since"] is None else _local_time(sa["since"])
        table.add_row(sa["spi"], sa["peer"], str(sa["reqid"]), sa["child"] or "", since)
    return table


def _holds(holds: list[Hold]) -> Table:
    table = _table("Held calls", "Thread", "Flow", "Limit")
    for hold in holds:
        table.add_row(str(hold["pid"]), hold["flow"], f"{hold['limit']:.1f} s")
    return table


def _namespaces(namespaces: list[Namespace]) -> Table:
    table = _table("Other network namespaces", "Process", "Judged by", "Outside this host's SPD")
    for item in namespaces:
        pid = "" if item["pid"] is None else str(item["pid"])
        judge = f"instance {item['instance']}" if item["instance"] else "this instance"
        table.add_row(pid, judge, "\n".join(item["outside"]))
    return table


def _local_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")


def _counters(counters: Counters) -> Table:
    table = _table("Counters", "", "Count", "Reasons")
    table.columns[1].justify = "right"
    reasons = counters["reasons"]
    for name, count, prefix, audited in (
        ("requests allowed", counters["allowed"], "allow_", 0),
        ("requests refused", counters["refused"], "refuse_", counters["audited"]),
        ("requests held", counters["held"], None, 0),
        ("packets blocked", counters["leaked_blocked"], "block_", counters["leaked_audited"]),
    ):
        why = [] if prefix is None else _by_reason(reasons, prefix)
        if audited:
            why.append(f"{audited} of these let through in audit mode")
        table.add_row(name, str(count), ", ".join(why))
    return table


def _by_reason(reasons: dict[str, int], prefix: str) -> list[str]:
    return [
        f"{count} {name.removeprefix(prefix).replace('_', ' ')}"
        for name, count in reasons.items()
        if count and name.startswith(prefix)
    ]
