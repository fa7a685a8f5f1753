"""What the controller reports of itself, for the status document and for the service manager."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from errno import EPERM, errorcode
from typing import TYPE_CHECKING, Any

from ipsecgate.admin.offline import sa_document, sa_source
from ipsecgate.admin.policy_document import policy_document
from ipsecgate.admin.problem_document import problem_document
from ipsecgate.admin.settings_document import settings_document
from ipsecgate.admin.status_document import (
    Configured,
    ControllerStatus,
    Drift,
    HeldCall,
    Namespace,
    Negotiated,
    Negotiation,
    Process,
    Sa,
    TimeToCovered,
)
from ipsecgate.controller.tally import Tally
from ipsecgate.core.gate.coverage import Coverage
from ipsecgate.core.gate.gate import Gate
from ipsecgate.core.gate.misfit import absent_children, no_child
from ipsecgate.core.model.flow import Flow, parse_address
from ipsecgate.core.model.ipsec import Action
from ipsecgate.core.model.problem import Problem
from ipsecgate.core.state.silence import Silent
from ipsecgate.edges.host.config import Config

if TYPE_CHECKING:
    from ipsecgate.admin.why import Decided, Decision


def controller_status(
    gate: Gate,
    process: Process,
    *,
    targets: Sequence[str],
    namespaces: list[Namespace],
    tally: Tally,
    time_to_covered: list[TimeToCovered],
    changed_entries: int,
    errors: Sequence[Problem],
    silent: Sequence[Silent],
) -> ControllerStatus:
    """Return the controller's part of the document.

    `changed_entries`: hook-table entries that something else had changed and that were repaired.
    `errors`: those that the gate does not know. `silent`: children that receive nothing.
    """
    names = {policy.name for policy in gate.policies}
    return {
        **process,
        "drift": Drift(kernel=gate.protection.drift, maps=changed_entries),
        "errors": [*map(problem_document, (*_gate_errors(gate), *errors))],
        "warnings": [problem_document(one.problem) for one in silent],
        "sa_source": sa_source(gate.protection.sa_source),
        "children": [str(c.name) for c in gate.ike.loaded.children],
        "targets": list(targets),
        "policies": [policy_document(policy) for policy in gate.policies],
        "negotiations": _negotiations(gate),
        "negotiated": [
            Negotiated(policy=policy, outcome=outcome, count=count)
            for (policy, outcome), count in gate.negotiations.ended.items()
            if policy in names
        ],
        "refused_by_policy": tally.by_policy(names),
        "refused_by_cgroup": tally.by_cgroup(),
        "sas": _userspace_sas(gate) if gate.protection.in_userspace else _kernel_sas(gate),
        "held": gate.holds.total,
        "holds": [
            HeldCall(
                pid=made.pid,
                flow=str(made.flow),
                daddr=str(made.flow.daddr),
                proto=made.flow.proto,
                dport=made.flow.dport,
                since=made.since,
                limit=made.limit,
                child=str(child) if (child := gate.holds.child_of(made.flow)) else None,
                policy=_policy_name(gate, made.flow),
            )
            for made in gate.holds.calls.values()
        ],
        "namespaces": namespaces,
        "time_to_covered": time_to_covered,
    }


def configured(gate: Gate, config: Config, targets: Sequence[str]) -> Configured:
    """Return the configuration in force; `config` is what it was read as."""
    derived = gate.policy_table.derived(gate.ike.loaded.children)
    return {
        **settings_document(config, targets),
        "policies": [policy_document(policy) for policy in gate.policies],
        "derived": [policy_document(policy) for policy in derived],
    }


def summary(gate: Gate) -> str:
    """Return the state of the gate in one line, for the service manager."""
    if gate.ike.problem is not None:
        return f"{gate.consequence}: {gate.ike.problem.text}"
    if gate.errors:
        return gate.errors[0].text
    negotiations = gate.negotiations.by_child.values()
    covered = sum(item.coverage is Coverage.COVERED for item in negotiations)
    count = len(gate.policies)
    policies = f"{count} {'policy' if count == 1 else 'policies'}"
    children = "child" if len(negotiations) == 1 else "children"
    text = f"{policies}; {covered} of {len(negotiations)} {children} covered"
    failed = [item for item in negotiations if item.last_error is not None]
    last = max(failed, key=lambda item: item.failed_at, default=None)
    return f"{text}; {last.last_error.text}" if last and last.last_error else text


def awaited(gate: Gate, flow: Flow) -> tuple[str | None, str]:
    """Return the child that a refused flow waits for, and why IKE has not brought it up.

    None: no child would protect it, or no policy has it protected; "": nothing is wrong.
    """
    found = gate.policy_table.policy_for(flow)
    if found is None or found[1].action is not Action.PROTECT:
        return None, ""
    if gate.ike.problem is not None:
        return None, gate.ike.problem.text
    routed = gate.protection.routing.route(flow)
    choices = gate.demand.choices(flow, routed, found[1])
    name = gate.negotiations.preferred(choices)
    if name is None:
        return None, no_child(gate.ike.loaded, found[1], routed.last).text
    known = gate.negotiations.by_child.get(name)
    return str(name), known.last_error.text if known and known.last_error else ""


def _gate_errors(gate: Gate) -> list[Problem]:
    absent = absent_children(gate.ike.loaded, gate.policies)
    ignored = "ignored part of what strongSwan reports"
    return [
        *gate.errors,
        *([gate.ike.problem] if gate.ike.problem is not None else absent),
        *(Problem(f"{ignored}: {reason}") for reason in gate.ike.unread),
    ]


def _policy_name(gate: Gate, flow: Flow) -> str | None:
    found = gate.policy_table.policy_for(flow)
    return None if found is None else found[1].name


def _negotiations(gate: Gate) -> list[Negotiation]:
    return [
        {
            "child": str(name),
            "state": item.coverage.value,
            "attempts": item.attempts,
            "last_error": item.last_error.text if item.last_error else "",
            "advice": item.last_error.advice if item.last_error else "",
            "failed_at": item.failed_at if item.last_error else None,
            "flow": str(item.flow),
            "policy": item.policy,
        }
        for name, item in gate.negotiations.by_child.items()
    ]


def _userspace_sas(gate: Gate) -> list[Sa]:
    return [
        {
            "spi": f"{sa.spi_out:08x}",
            "protocol": "esp",
            "reqid": sa.reqid,
            "peer": str(sa.remote_host),
            "child": str(sa.name),
            "since": None,
            "until": None,
        }
        for sa in gate.protection.userspace_esp.sas()
    ]


def _kernel_sas(gate: Gate) -> list[Sa]:
    kernel_state = gate.protection.kernel_state
    return [
        sa_document(sa, str(name) if (name := kernel_state.child_of(sa)) else None)
        for sa in kernel_state.outbound_sas()
    ]


def flow_of(words: Mapping[str, Any]) -> Flow:
    """Return the flow of a request. Raises: KeyError, TypeError, ValueError if it has none."""
    source = words["saddr"]
    return Flow(
        parse_address(words["daddr"]),
        int(words["proto"]),
        int(words["dport"]),
        None if source is None else parse_address(source),
        int(words["sport"]),
        int(words["mark"]),
        int(words["device"]),
        int(words["netns"]),
    )


def why(gate: Gate, flow: Flow, silent: Sequence[Silent]) -> Decided:
    """Answer the verb `why`: the decision about one flow. `silent`: as in `controller_status`."""
    from ipsecgate.core.gate.explanation import explain  # noqa: PLC0415 - 0.6 MiB, seldom used
    from ipsecgate.core.gate.kernel_steps import Step  # noqa: PLC0415

    found = explain(gate, flow)
    unanswered = [one for one in silent if found.is_allowed and one.carries(flow)]
    steps = [*found.steps, *((Step.SA, one.problem.text) for one in unanswered)]
    decision: Decision = {
        "allowed": found.is_allowed,
        "reason": found.reason.name.lower(),
        "error": None if found.is_allowed else errorcode[found.error or EPERM],
        "steps": [{"step": step.value, "text": text} for step, text in steps],
        "advice": unanswered[0].problem.advice if unanswered else found.advice,
    }
    return {"pid": os.getpid(), "decision": decision}
