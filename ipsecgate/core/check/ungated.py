"""Connections to protected destinations that processes outside the gated cgroups have."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ipsecgate.core.check.finding import Finding, ok, warning
from ipsecgate.core.check.order import label
from ipsecgate.core.model.flow import Flow
from ipsecgate.core.model.ipsec import Action
from ipsecgate.core.model.policy import Policy

NAME = "ungated"
SHOWN = 8  # findings


def check_ungated(
    policies: Sequence[Policy], connections: Iterable[tuple[Flow, str]]
) -> list[Finding]:
    """Judge the connections of processes that are not gated.

    `policies`: those in force. `connections`: each with the target that names its cgroup, or with
    the cgroup's path; "": it is the root cgroup.
    """
    found = [*_found(policies, connections)]
    if not found:
        return [ok(NAME, "no other process has a connection that a policy protects")]
    if len(found) > SHOWN:
        rest = f"{len(found) - SHOWN} more such cgroups, or policies"
        return [*found[:SHOWN], warning(NAME, rest, "gate these, and check again")]
    return found


def _found(
    policies: Sequence[Policy], connections: Iterable[tuple[Flow, str]]
) -> Iterator[Finding]:
    seen: set[tuple[str, str]] = set()
    for flow, target in connections:
        policy = next((one for one in policies if _names(one, flow)), None)
        if policy is None or policy.action is not Action.PROTECT or (target, policy.name) in seen:
            continue
        seen.add((target, policy.name))
        who = target or "a process in the root cgroup"
        yield warning(
            NAME,
            f"{who} is not gated, and has a connection to {flow}, which {label(policy)} protects: "
            "the gate does not check its calls",
            gate_it(target),
        )


def gate_it(target: str, where: str = "") -> str:
    """Return how to gate a cgroup ("": the root cgroup); `where`: file and line of gate.cgroups."""
    if not target:
        return "start it as a systemd service, and gate that"
    place = f" ({where})" if where else ""
    return (
        f'add "{target}" to gate.cgroups{place}, then `ipsecgate reload`; until then '
        f"`ipsecgate attach {target}`"
    )


def _names(policy: Policy, flow: Flow) -> bool:
    return (
        policy.proto in (0, flow.proto)
        and policy.ports[0] <= flow.dport <= policy.ports[1]
        and policy.local_ports[0] <= flow.sport <= policy.local_ports[1]
        and any(flow.daddr in network for network in policy.remote)
    )
