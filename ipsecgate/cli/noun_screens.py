"""The nouns' documents, drawn as tables. All texts of a document are printable."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from ipsecgate.admin.documents import Cgroups, Flows, GatedCgroup, Holds, Policies, Sas
from ipsecgate.admin.status_document import Policy
from ipsecgate.cli.tables import (
    WIDE,
    ago,
    coloured,
    duration,
    first,
    heading,
    left,
    left_out,
    lines,
    table,
    two_lines,
    without_controller,
)


def policies(document: Policies, width: int, *, everything: bool) -> RenderableType:
    """Draw the policies in the order in which they are searched."""
    wide = width >= WIDE
    columns = ("Policy", "Action", "To", "Port", "Coverage")
    rows = table(*columns, "Child", "Source") if wide else table(*columns)
    for policy in first(document["policies"], everything=everything):
        coverage = coloured(policy["coverage"] or "")
        remote = lines(policy["remote"], everything=everything)
        cells: tuple[str | Text, ...] = (policy["action"], remote, _ports(policy))
        if wide:
            child = policy["child"] or ("by selector" if policy["coverage"] else "")
            rows.add_row(policy["name"], *cells, coverage, child, _source(policy))
        else:
            name = two_lines(policy["name"], _source(policy))
            child = f"child {policy['child']}" if policy["child"] else ""
            rows.add_row(name, *cells, two_lines(coverage, child))
    failed = [one for one in document["policies"] if one["last_error"]]
    return Group(
        *without_controller(
            document["controller"], "these are configured, and only covered flows are let go"
        ),
        rows if document["policies"] else Text("No policy is known.", "yellow"),
        *left_out(document["policies"], everything=everything),
        *([heading("Last failure")] if failed else []),
        *(Text(f"{one['name']}: {one['last_error']}", "red") for one in failed[:5]),
        Text(f"\nOther flows: {document['default']}.", "dim"),
    )


def _ports(policy: Policy) -> str:
    port = (
        policy["protocol"] if policy["port"] == "any" else f"{policy['protocol']} {policy['port']}"
    )
    return port if policy["local_port"] == "any" else f"{port}\nfrom {policy['local_port']}"


def _source(policy: Policy) -> str:
    """Return a policy's source, its file without folders; a connection's name is the policy's."""
    return "its connection" if policy["derived"] else policy["source"].rpartition("/")[2]


def sas(document: Sas, width: int, *, everything: bool) -> RenderableType:
    """Draw the live outbound SAs."""
    wide = width >= WIDE
    rows = table("SPI", "Peer", "Child", ">Reqid", ">For", ">Ends in", *(["Proto"] if wide else []))
    for sa in first(document["sas"], everything=everything):
        cells = [sa["spi"], sa["peer"], sa["child"] or "", str(sa["reqid"])]
        cells += [ago(sa["since"]), left(sa["until"])]
        rows.add_row(*cells, *([sa["protocol"]] if wide else []))
    return Group(
        *without_controller(
            document["controller"], "these SAs let flows go until they end; nothing replaces them"
        ),
        rows if document["sas"] else Text("No SA protects anything."),
        *left_out(document["sas"], everything=everything),
    )


def holds(document: Holds, width: int, *, everything: bool) -> RenderableType:  # noqa: ARG001
    """Draw the held calls."""
    rows = table("Process", "Flow", "Waits for", ">Since", ">Limit")
    for call in first(document["holds"], everything=everything):
        rows.add_row(
            f"{call['comm'] or ''} ({call['pid']})",
            call["flow"] or "unknown",
            call["child"] or "a child to be chosen" if call["flow"] else "a controller",
            ago(call["since"]),
            duration(call["limit"]),
        )
    return Group(
        *without_controller(document["controller"], "these calls wait for the next one to answer"),
        rows if document["holds"] else Text("No call is held."),
        *left_out(document["holds"], everything=everything),
    )


def cgroups(document: Cgroups, width: int, *, everything: bool) -> RenderableType:
    """Draw the gated cgroups, and the targets that are awaited."""
    wide = width >= WIDE
    columns = ("Cgroup", "By", ">Processes", "Hooks")
    rows = table(*columns, "Other programs") if wide else table(*columns)
    gated = document["cgroups"]
    for one in first(gated, everything=everything):
        name = one["cgroup"] or f"removed cgroup {one['cgroup_id']}"
        others = "\n".join(one["others"])
        by = "configuration" if one["by"] == one["cgroup"] else one["by"]
        count = "" if one["processes"] is None else str(one["processes"])
        rows.add_row(
            name if wide else two_lines(name, others), by, count, _hooks(one),
            *([others] if wide else []),
        )  # fmt: skip
    parts: list[RenderableType] = [
        *without_controller(document["controller"], "what is awaited is not gated when it appears"),
        rows
        if gated
        else Text("Nothing is gated: use `ipsecgate attach`, or gate.cgroups.", "yellow"),
        *left_out(gated, everything=everything),
    ]
    if document["awaited"]:
        awaited = table("Target", "")
        for target in document["awaited"]:
            awaited.add_row(target["target"], Text(target["text"], "yellow"))
        parts += [heading("Awaited"), awaited]
    parts += [Text(f"\n{text}", "yellow") for one in gated for text in one["warnings"]]
    return Group(*parts)


def _hooks(one: GatedCgroup) -> Text:
    if one["missing"]:
        return Text(f"without {', '.join(one['missing'])}", "bold red")
    return Text(f"all {len(one['hooks'])}", "green")


def flows(document: Flows, width: int, *, everything: bool) -> RenderableType:
    """Draw connections, flows that were refused lately, and what the hooks remember."""
    wide = width >= WIDE
    parts: list[RenderableType] = [
        *without_controller(document["controller"], "its tables decide, as it left them")
    ]
    connections, refused = document["connections"], document["refused"]
    decisions = document["decisions"]
    if connections:
        rows = table("Flow", "Policy", "Now", *(["From", "Cgroup"] if wide else []))
        for one in first(connections, everything=everything):
            flow = one["flow"] if wide else two_lines(one["flow"], f"from {one['source']}")
            more = [one["source"], one["cgroup"]] if wide else []
            rows.add_row(flow, one["policy"] or "", coloured(one["state"]), *more)
        parts += [heading("Connections of gated cgroups"), rows]
        parts += left_out(connections, everything=everything)
    if refused:
        rows = table("Flow", ">Last", "Why", "Now", *(["Policy"] if wide else []))
        for each in first(refused, everything=everything):
            policy = each["policy"] or "none"
            flow = each["flow"] if wide else two_lines(each["flow"], f"policy {policy}")
            cells = (ago(each["last"]), each["text"], coloured(each["state"]))
            rows.add_row(flow, *cells, *([policy] if wide else []))
        parts += [heading("Refused lately"), rows, *left_out(refused, everything=everything)]
    if decisions:
        rows = table("Flow", "From", "Why")
        for decision in first(decisions, everything=everything):
            source = decision["source"] or ""
            rows.add_row(decision["flow"], source, coloured(decision["reason"]))
        parts += [heading("Let go since the tables last changed"), rows]
        parts += left_out(decisions, everything=everything)
    if not (connections or refused or decisions):
        parts.append(Text("No flow of a gated process is known."))
    return Group(*parts)
