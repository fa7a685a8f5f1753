"""The status document, drawn as one screen. All texts of the document are printable."""

from __future__ import annotations

import time
from collections import Counter

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ipsecgate.admin.coverage import COVERAGES
from ipsecgate.admin.status import LATELY
from ipsecgate.admin.status_document import Counters, Negotiation, Policy, Status
from ipsecgate.cli.tables import (
    ago,
    child_name,
    failure,
    heading,
    number,
    problem_lines,
    reason_text,
    table,
)
from ipsecgate.core.gate.coverage import Coverage

SHOWN = 5  # namespaces, cgroups and the like
NEWS = 3  # refusals, failed negotiations and networks
IDLE = "not asked for yet"


def brief(document: Status) -> Text:
    """Draw one line, and a second one with the next thing to do."""
    problems = document["problems"]
    if problems:
        more = f" (and {number(len(problems) - 1, 'more problem')})" if problems[1:] else ""
        text = Text.assemble(("ipsecgate degraded", "bold red"), f": {problems[0]['text']}{more}")
        return text.append(f"\nnext: {problems[0]['advice']}" if problems[0]["advice"] else "")
    protect = [one for one in document["policies"] if one["action"] == "protect"]
    covered = sum(one["coverage"] == "covered" for one in protect)
    audit = ", audit mode" if document["mode"] == "audit" else ""
    refused = f", {_lately(document)}" if document["refused"] else ""
    return Text.assemble(
        ("ipsecgate ok", "bold green"),
        audit,
        (refused, "bold yellow"),
        f": {covered} of {number(len(protect), 'protect policy', 'protect policies')} "
        f"covered, {number(len(document['sas']), 'SA')}, "
        f"{number(len(document['holds']), 'call')} held",
    )


def _lately(document: Status) -> str:
    """Return how many flows were refused lately, and are still."""
    flows = number(len(document["refused"]), "flow")
    audit = document["mode"] == "audit"
    return f"{flows} would be refused" if audit else f"{flows} refused lately"


def screen(document: Status) -> RenderableType:
    """Draw the whole screen."""
    parts: list[RenderableType] = [_headline(document)]
    for problem in document["problems"]:
        parts += problem_lines(problem, "red")
    for warning in document["warnings"]:
        parts += problem_lines(warning, "yellow")
    parts += [Text(), _summary(document), *_failures(document), *_refused(document)]
    return Group(*parts)


def _headline(document: Status) -> Text:
    problems = document["problems"]
    state = ("healthy", "bold green")
    if document["refused"]:
        state = (_lately(document), "bold yellow")
    if problems:
        state = (number(len(problems), "problem"), "bold red")
    name = "" if document["instance"] == "default" else f" {document['instance']}"
    mode = (f"  mode {document['mode']}, default {document['default']}", "dim")
    if document["mode"] == "audit":
        mode = (f"  mode audit: nothing is refused, default {document['default']}", "bold yellow")
    return Text.assemble((f"ipsecgate{name}: ", "bold"), state, mode)


def _summary(document: Status) -> Table:
    rows = Table(box=None, pad_edge=False, show_header=False)
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column(overflow="fold")
    controller = document["controller"]
    if controller["alive"]:
        source = document["sa_source"] or "not known until strongSwan answers"
        since = f"running, pid {controller['pid']}, for {ago(controller['since'])}"
        rows.add_row("Controller", f"{since}; SA source: {source}")
    rows.add_row("Gated", _gated(document))
    rows.add_row("Policies", _policies(document["policies"]))
    for line in _partly(document["policies"]):
        rows.add_row("", line)
    if document["sas"]:
        peers = {sa["peer"] for sa in document["sas"]}
        rows.add_row("SAs", f"{len(document['sas'])} with {number(len(peers), 'peer')}")
    else:
        rows.add_row("SAs", "none")
    if document["holds"]:
        known = [hold["since"] for hold in document["holds"] if hold["since"] is not None]
        longest = f", the longest for {ago(min(known))}" if known else ""
        rows.add_row("Held", f"{number(len(document['holds']), 'call')}{longest}")
    for name, text in _counted(document["counters"]):
        rows.add_row(name, text)
    rows.add_row("Tables", _tables(document))
    for item in document["namespaces"][:SHOWN]:
        judge = f"instance {item['instance']}" if item["instance"] else "this instance"
        pid = "" if item["pid"] is None else f"of process {item['pid']}, "
        outside = (
            f"; outside this host's SPD: {'; '.join(item['outside'])}" if item["outside"] else ""
        )
        rows.add_row("Namespace", f"{pid}judged by {judge}{outside}")
    if document["namespaces"][SHOWN:]:
        rows.add_row("", f"and {len(document['namespaces']) - SHOWN} more namespaces: --json")
    return rows


def _gated(document: Status) -> Text:
    names = list(dict.fromkeys(hook["cgroup"] for hook in document["hooks"] if hook["attached"]))
    if not names:
        return Text("nothing: run `ipsecgate attach`, or set gate.cgroups", "yellow")
    shown = ", ".join(_last_part(name) for name in names[:SHOWN])
    more = f" and {len(names) - SHOWN} more" if names[SHOWN:] else ""
    return Text(f"{number(len(names), 'cgroup')}: {shown}{more}")


def _last_part(cgroup: str) -> str:
    """Return the name of a cgroup without the folders above it, the root as it is."""
    parts = cgroup.rpartition("/")
    return parts[2] if cgroup.count("/") > 3 else cgroup


def _policies(policies: list[Policy]) -> Text:
    if not policies:
        return Text("none known", "yellow")
    states = Counter(_state(one) for one in policies)
    names = [*COVERAGES, IDLE, "bypass", "discard"]
    counts = ", ".join(
        f"{states[name]} {name.replace('partly-', 'partly ')}" for name in names if states[name]
    )
    return Text(f"{len(policies)}: {counts}")


def _state(policy: Policy) -> str:
    """Return a policy's coverage, or its action; IDLE if it is uncovered and nobody asked."""
    if policy["coverage"] == "uncovered" and not (policy["children"] or policy["last_error"]):
        return IDLE
    return policy["coverage"] or policy["action"]


def _partly(policies: list[Policy]) -> list[Text]:
    """Return what is missing of the policies that are partly covered."""
    found = [one for one in policies if one["uncovered"]]
    texts = []
    for one in found[:NEWS]:
        more = f" and {len(one['uncovered']) - NEWS} more" if one["uncovered"][NEWS:] else ""
        texts.append(f"{one['name']}: no live SA covers {', '.join(one['uncovered'][:NEWS])}{more}")
    if found[NEWS:]:
        texts.append(f"and {len(found) - NEWS} more: `ipsecgate policies`")
    return [Text(text, "red") for text in texts]


def _counted(counters: Counters) -> list[tuple[str, str]]:
    """Return the rows for calls and packets."""
    refused = _numbers(counters, "refuse", counters["refused"], counters["audited"])
    found = [("Calls", f"{counters['allowed']} allowed, {refused}")]
    blocked, audited = counters["leaked_blocked"], counters["leaked_audited"]
    if blocked or audited:
        found.append(("Packets", _numbers(counters, "block", blocked, audited)))
    return found


def _numbers(counters: Counters, result: str, stopped: int, audited: int) -> str:
    """Return how many calls or packets were stopped, and why; of several reasons each number."""
    text = f"{stopped} {'refused' if result == 'refuse' else 'blocked'}"
    if audited:
        text += f", {audited} allowed only because of audit mode"
    reasons = {n: c for n, c in counters["reasons"].items() if c and n.startswith(f"{result}_")}
    why = [
        f"{count} {reason_text(name)}" if len(reasons) > 1 else reason_text(name)
        for name, count in reasons.items()
    ]
    return f"{text} ({', '.join(why)})" if why else text


def _tables(document: Status) -> str:
    tables = document["hook_tables"]
    policies = number(tables["policy_entries"], "policy entry", "policy entries")
    spd = number(tables["spd_entries"], "SPD entry", "SPD entries")
    masks = number(tables["policy_masks"], "mask")
    memory = f"{tables['memory'] / (1 << 20):.1f} MiB"
    return f"{policies} in {masks}, {spd} in {tables['spd_masks']}; {memory}"


def _failures(document: Status) -> list[RenderableType]:
    failed = _failing(document["negotiations"])
    more = f": {len(failed)}, all in `ipsecgate policies`" if failed[NEWS:] else ""
    parts: list[RenderableType] = [heading(f"Failed negotiations{more}")] if failed else []
    for one in failed[:NEWS]:
        attempts = number(one["attempts"], "attempt")
        about = f"{child_name(one['child'])}: {one['state']}, {attempts}"
        about += f", failed {ago(one['failed_at'])} ago"
        parts += failure(about, one["last_error"], one["advice"])
    return parts


def _failing(negotiations: list[Negotiation]) -> list[Negotiation]:
    """Return the failures that hold as far as is known, the last first.

    One that nobody tries again holds for a while, unless the same flow has a newer one.
    """
    found, flows = list[Negotiation](), set[str]()
    failed = [one for one in negotiations if one["last_error"]]
    for one in sorted(failed, key=lambda one: one["failed_at"] or 0.0, reverse=True):
        is_retried = one["state"] in (Coverage.NEGOTIATING.value, Coverage.BACK_OFF.value)
        is_new = time.time() - (one["failed_at"] or 0.0) < LATELY
        if is_retried or (is_new and one["flow"] not in flows):
            found.append(one)
            flows.add(one["flow"])
    return found


def _refused(document: Status) -> list[RenderableType]:
    refused = document["refused"]
    if not refused:
        return []
    rows = table("Flow", "Policy", "Why", ">Last")
    for one in refused[:NEWS]:
        why = f"no live SA: child {one['child']} failed" if one["child"] else one["text"]
        rows.add_row(one["flow"], one["policy"] or "none", why, f"{ago(one['last'])} ago")
    more = f": {len(refused)} flows, all in `ipsecgate flows`" if refused[NEWS:] else ""
    protocol, _, target = refused[0]["flow"].partition(" ")
    target += "/udp" if protocol == "udp" else ""
    parts: list[RenderableType] = [
        heading(f"Refused in the last 10 minutes{more}"),
        rows,
    ]
    if protocol in ("tcp", "udp"):
        parts.append(Text(f"next: `ipsecgate why {target}`; `ipsecgate check`", "yellow"))
    return parts
