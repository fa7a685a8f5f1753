"""The nouns' documents, drawn as tables. All texts of a document are printable."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ipsecgate.admin.documents import (
    Cgroups,
    Connection,
    Flows,
    GatedCgroup,
    Holds,
    Policies,
    Sas,
)
from ipsecgate.admin.status_document import Hold, Policy
from ipsecgate.cli.tables import (
    WIDE,
    ago,
    coverage,
    duration,
    failure,
    first,
    heading,
    left,
    left_out,
    lines,
    parts,
    problem_lines,
    reason,
    table,
    two_lines,
    without_controller,
)


def policies(document: Policies, width: int, *, everything: bool) -> RenderableType:
    """Draw the policies in the order in which they are searched."""
    wide = width >= WIDE
    rows = table(
        "Policy", "Action", "To", "Port", "Coverage", *(["Child"] if wide else []), "Source"
    )
    known = document["policies"]
    shown = first(known, everything=everything)
    longest = max((len(net) for one in shown for net in one["remote"]), default=0)
    rows.columns[2].no_wrap = longest <= width // 3  # a broken network would mislead
    for policy in shown:
        remote = lines(policy["remote"], everything=everything)
        covered = coverage(policy["coverage"], policy["last_error"])
        if wide:
            cells = [covered, Text(lines(_children(policy), everything=everything))]
        else:
            cells = [two_lines(covered, f"child {policy['child']}" if policy["child"] else "")]
        name, action = policy["name"], policy["action"]
        rows.add_row(name, action, remote, _ports(policy), *cells, _source(policy))
    return parts(
        *without_controller(
            document["controller"], "these are configured, and only covered flows are allowed"
        ),
        rows if known else Text("No policy is known.", "yellow"),
        *left_out(known, everything=everything),
        *_without_sa(known, everything=everything),
        *_failures(known, everything=everything),
        Text(f"\nOther flows: {document['default']}.", "dim"),
    )


def _without_sa(known: list[Policy], *, everything: bool) -> list[RenderableType]:
    """Return the networks that have no SA, of policies that are covered otherwise."""
    partly = [one for one in known if one["uncovered"]]
    if not partly:
        return []
    rows = table("Policy", "No live SA covers")
    for one in first(partly, everything=everything):
        rows.add_row(one["name"], Text(lines(one["uncovered"], everything=everything), "red"))
    return [
        heading("Partly covered"),
        rows,
        *left_out(partly, everything=everything),
        Text(f"next: `ipsecgate up {partly[0]['name']}` negotiates it, or says why not", "yellow"),
    ]


def _failures(known: list[Policy], *, everything: bool) -> list[RenderableType]:
    failed = [one for one in known if one["last_error"]]
    if not failed:
        return []
    found: list[RenderableType] = [heading("Last failure of each policy")]
    for one in first(failed, everything=everything):
        about = f"{one['name']}, {ago(one['failed_at'])} ago"
        found += failure(about, one["last_error"], one["advice"])
    return [*found, *left_out(failed, everything=everything)]


def _children(policy: Policy) -> list[str]:
    """Return the children that protect a policy's flows, as far as they are known."""
    return policy["children"] or ([policy["child"]] if policy["child"] else [])


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
    columns = ("SPI", "Peer", "Connection/child", ">Reqid", ">For", ">Ends in")
    rows = table(*columns, *(["Proto"] if wide else []))
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
            _awaited(call),
            ago(call["since"]),
            duration(call["limit"]),
        )
    return Group(
        *without_controller(document["controller"], "these calls wait for the next one to answer"),
        rows if document["holds"] else Text("No call is held."),
        *left_out(document["holds"], everything=everything),
    )


def _awaited(call: Hold) -> str:
    """Return what a held call waits for."""
    if not call["flow"]:
        return "a controller"
    return f"child {call['child']}" if call["child"] else "a child to be chosen"


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
    found: list[RenderableType] = [
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
            if target["advice"]:
                awaited.add_row("", Text(f"next: {target['advice']}", "yellow"))
        found += [heading("Awaited"), awaited]
    for warning in [warning for one in gated for warning in one["warnings"]]:
        found += [Text(), *problem_lines(warning, "yellow")]
    return Group(*found)


def _hooks(one: GatedCgroup) -> Text:
    if one["missing"]:
        return Text(f"without {', '.join(one['missing'])}", "bold red")
    return Text(f"all {len(one['hooks'])}", "green")


def flows(document: Flows, width: int, *, everything: bool) -> RenderableType:
    """Draw connections, flows that were refused lately, and what the hooks remember."""
    wide = width >= WIDE
    found: list[RenderableType] = [
        *without_controller(document["controller"], "its tables decide, as it left them")
    ]
    connections, refused = document["connections"], document["refused"]
    decisions = document["decisions"]
    if connections:
        found += [
            heading("Connections of gated cgroups"),
            _connections(first(connections, everything=everything), wide=wide),
            *left_out(connections, everything=everything),
        ]
    if refused:
        rows = table("Flow", "Policy", ">Last", *(["Why"] if wide else []), "Now")
        for each in first(refused, everything=everything):
            now, cause = reason(each["state"]), Text()
            if each["cause"]:
                cause = Text(f": {each['cause']}, {ago(each['failed_at'])} ago")
            if each["advice"]:
                cause.append(f"\nnext: {each['advice']}", "yellow")
            cells = [each["flow"], each["policy"] or "none", f"{ago(each['last'])} ago"]
            if wide:
                rows.add_row(*cells, Text(each["text"]).append(cause), now)
            else:
                rows.add_row(*cells, now.append(cause))
        found += [heading("Refused lately"), rows, *left_out(refused, everything=everything)]
    if decisions:
        bound = any(each["source"] for each in decisions)
        rows = table("Flow", *(["From"] if bound else []), "Why")
        for decision in first(decisions, everything=everything):
            source = [decision["source"] or "any"] if bound else []
            rows.add_row(decision["flow"], *source, reason(decision["reason"]))
        found += [heading("Allowed since the tables last changed"), rows]
        found += left_out(decisions, everything=everything)
    if not (connections or refused or decisions):
        found.append(Text("No flow of a gated process is known."))
    return parts(*found)


def _connections(shown: Sequence[Connection], *, wide: bool) -> Table:
    rows = table("Flow", "Process", "Policy", "Now", *(["From", "Cgroup"] if wide else []))
    for one in shown:
        flow = one["flow"] if wide else two_lines(one["flow"], f"from {one['source']}")
        process = "" if one["pid"] is None else f"{one['comm'] or ''} ({one['pid']})"
        more = [one["source"], one["cgroup"].removeprefix("/sys/fs/cgroup")] if wide else []
        rows.add_row(flow, process, one["policy"] or "none", reason(one["state"]), *more)
    return rows
