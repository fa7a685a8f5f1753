"""Assemble the status document: pinned maps, and what the controller reports (`controller.report`).

Works without a controller: `controller.alive` is then false, the policies come from the
configuration, the SAs from the kernel, and the held calls from the files of the inspectors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from ipsecgate.admin import offline
from ipsecgate.admin.answers import checked
from ipsecgate.admin.coverage import with_coverage
from ipsecgate.admin.judge import Judge
from ipsecgate.admin.loader import pins_of
from ipsecgate.admin.problem_document import Problem
from ipsecgate.admin.status_document import (
    Controller,
    ControllerStatus,
    GateState,
    HeldCall,
    Hold,
    Hook,
    HookCounters,
    Negotiation,
    Refusal,
    Status,
)
from ipsecgate.core.model.flow import Flow
from ipsecgate.core.tables.layout import EXPLAINED, Reason, Setting, TableId
from ipsecgate.edges.bpf.maps import Maps
from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.edges.host import cgroups, control, processes
from ipsecgate.edges.host.config import Config
from ipsecgate.errors import NoControllerError
from ipsecgate.paths import Paths

LATELY = 600.0  # seconds for which a refusal is news
REFUSALS = 100  # shown at most


def status_of(paths: Paths, read_config: Callable[[], Config]) -> Status:
    """Return the whole document. `read_config` is only called if no controller answers.

    Raises: FileNotFoundError if nothing is loaded; OSError; GateError.
    """
    answer = ask_controller(paths)
    pins = pins_of(paths)
    with Maps(pins) as maps:
        counters = _hook_counters(maps.counters())
        spd = maps.table(TableId.SPD)
        policy_table = maps.table(TableId.POLICY)
        audit = bool(maps.setting(Setting.AUDIT))
        deny = bool(maps.setting(Setting.DENY))
        memory = maps.memory()
        gate: GateState = answer or offline.state(paths, read_config, spd)
        judge = Judge(maps, policy_table, spd)
        lately = maps.refusals()
        refused = refusals(judge, lately, gate, time.time() - LATELY)
    hooks = _hooks(pins)
    published = policy_table is not None
    problems = _problems(answer, gate["errors"], hooks, published=published, audit=audit)
    return {
        "instance": paths.instance,
        "mode": "audit" if audit else "enforce",
        "default": "deny" if deny else "allow",
        "sa_source": gate["sa_source"],
        "published": published,
        "controller": controller_of(answer),
        "healthy": not problems,
        "problems": problems,
        "errors": gate["errors"],
        "warnings": gate["warnings"],
        "hooks": hooks,
        "policies": with_coverage(
            gate["policies"], gate["negotiations"], gate["sas"], policy_table, spd
        ),
        "refused": [one for one in refused if one["state"].startswith("refuse")][:REFUSALS],
        "counters": {**counters, "held": gate["held"]},
        "hook_tables": {
            "policy_masks": len(policy_table.rows) if policy_table else 0,
            "policy_entries": policy_table.size if policy_table else 0,
            "spd_masks": len(spd.rows) if spd else 0,
            "spd_entries": spd.size if spd else 0,
            "memory": memory,
        },
        "drift": gate["drift"],
        "negotiations": gate["negotiations"],
        "negotiated": gate["negotiated"],
        "refused_by_policy": gate["refused_by_policy"],
        "refused_by_cgroup": gate["refused_by_cgroup"],
        "sas": gate["sas"],
        "holds": [_hold(call) for call in gate["holds"]],
        "namespaces": gate["namespaces"],
        "time_to_covered": gate["time_to_covered"],
    }


def ask_controller(paths: Paths) -> ControllerStatus | None:
    """Return what the controller reports of itself, None if none answers. Raises: GateError."""
    try:
        return checked(control.ask(paths.control, "status"), ControllerStatus)
    except NoControllerError:
        return None


def controller_of(answer: ControllerStatus | None) -> Controller:
    """Return the controller's part of every document."""
    if answer is None:
        return {"alive": False, "ready": False, "pid": None, "since": None}
    return {"alive": True, "ready": answer["ready"], "pid": answer["pid"], "since": answer["since"]}


def _problems(
    answer: ControllerStatus | None,
    errors: Sequence[Problem],
    hooks: Sequence[Hook],
    *,
    published: bool,
    audit: bool,
) -> list[Problem]:
    """Return what keeps the gate from being healthy; what matters most comes first."""
    found: list[Problem] = []
    observing = "in audit mode nothing is refused"
    if answer is None:
        found.append(
            {
                "text": "the controller is not running: "
                + (observing if audit else "covered flows go on, other protected ones are refused"),
                "advice": "see `journalctl -u ipsecgate`, then `systemctl start ipsecgate`",
            }
        )
    elif not answer["ready"]:
        found.append(
            {
                "text": "the controller is starting: what no SA covered before is refused",
                "advice": "wait a moment: `ipsecgate status --wait`",
            }
        )
    if not published:
        found.append(
            {
                "text": "no policy is known yet: "
                + (observing if audit else "everything but loopback is refused"),
                "advice": "start strongSwan, or configure policies",
            }
        )
    found += errors
    for number in sorted({hook["cgroup_id"] for hook in hooks if not hook["attached"]}):
        found.append(
            {
                "text": f"removed cgroup {number}: sockets that were made in it stay gated",
                "advice": "none needed: the controller removes this when the last of them is "
                f"closed. `ipsecgate detach {number}` ungates them now, so they may send in clear",
            }
        )
    return found


def refusals(
    judge: Judge,
    lately: Iterable[tuple[Flow, Reason, float]],
    gate: GateState,
    since: float = 0.0,
) -> list[Refusal]:
    """Return what was refused since then (wall clock), the last first."""
    names = [policy["name"] for policy in gate["policies"]]
    found: list[Refusal] = []
    for flow, reason, last in lately:
        if last < since:
            break
        now = judge.judge(flow)
        policy = now.name_in(names)
        uncovered = now.reason is Reason.REFUSE_UNCOVERED
        cause = _cause(flow, policy, gate["negotiations"]) if uncovered else None
        found.append(
            {
                "flow": str(flow),
                "source": None if flow.saddr is None else str(flow.saddr),
                "reason": reason.name.lower(),
                "text": EXPLAINED[reason],
                "cause": cause["last_error"] if cause else "",
                "advice": cause["advice"] if cause else "",
                "failed_at": cause["failed_at"] if cause else None,
                "child": cause["child"] if cause else None,
                "policy": policy,
                "last": last,
                "state": now.reason.name.lower(),
            }
        )
    return found


def _cause(
    flow: Flow, policy: str | None, negotiations: Iterable[Negotiation]
) -> Negotiation | None:
    """Return the negotiation whose failure keeps a flow refused; None if that is not certain."""
    own = [one for one in negotiations if one["policy"] == policy]
    asked = [one for one in own if one["flow"] == str(flow)]
    certain = asked or (own if len(own) == 1 else [])
    return next((one for one in certain if one["last_error"]), None)


def _hold(call: HeldCall) -> Hold:
    return {**call, "comm": processes.name_of(call["pid"])}


def _hooks(pins: Pins) -> list[Hook]:
    paths_by_id = cgroups.by_id()
    return [
        {
            "cgroup": str(paths_by_id.get(attachment.cgroup_id, "")),
            "cgroup_id": attachment.cgroup_id,
            "hook": attachment.hook,
            "attached": attachment.cgroup_id in paths_by_id,
            "prog_id": attachment.prog_id,
        }
        for attachment in pins.attachments()
    ]


def _hook_counters(counters: Mapping[Reason, int]) -> HookCounters:
    """Return the hooks' counters, added up by result, and each by its reason."""

    def total(prefix: str) -> int:
        return sum(count for reason, count in counters.items() if reason.name.startswith(prefix))

    return {
        "allowed": total("ALLOW") + counters[Reason.AUDITED],
        "refused": total("REFUSE") - counters[Reason.AUDITED],
        "audited": counters[Reason.AUDITED],
        "leaked_blocked": total("BLOCK") - counters[Reason.AUDITED_PACKETS],
        "leaked_audited": counters[Reason.AUDITED_PACKETS],
        "events_lost": counters[Reason.EVENTS_LOST],
        "reasons": {r.name.lower(): counters[r] for r in Reason if r < Reason.AUDITED},
    }
