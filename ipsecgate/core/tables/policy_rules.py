"""The operator's policies as rules of the hooks' policy table.

A socket that is not bound has source port 0 at the hooks, because the kernel has yet to choose its
port. If it may choose one of a policy's local ports, the policy names the flow, unless it is a
bypass policy: then the flow might turn out to be another. In the backstop the packet has its port.
"""

from __future__ import annotations

from ipsecgate.core.model.flow import ANY_PORT, PORT_MASK
from ipsecgate.core.model.ipsec import Action
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.tables.layout import Entry, State
from ipsecgate.core.tables.table import Rule, Ternary, may_be_chosen, port_masks, ternary

STATES = {
    Action.PROTECT: State.PROTECT,
    Action.BYPASS: State.BYPASS,
    Action.DISCARD: State.DISCARD,
}


def matches(policy: Policy) -> list[Ternary]:
    """Return the flows that a policy names, as the hooks match them."""
    return [
        ternary(network, proto=policy.proto, sport=local, dport=block)
        for network in policy.remote
        for block in port_masks(*policy.ports)
        for local in _local_blocks(policy)
    ]


def _local_blocks(policy: Policy) -> list[tuple[int, int]]:
    if policy.local_ports == ANY_PORT:
        return [(0, 0)]
    low, high = policy.local_ports
    blocks = port_masks(max(1, low), max(1, high))
    unbound = policy.action is not Action.BYPASS and any(may_be_chosen(*block) for block in blocks)
    return [*blocks, *([(0, PORT_MASK)] if unbound else [])]


def local_ranges(policy: Policy) -> list[tuple[int, int]]:
    """Return the source ports of the flows that a policy names, as ranges with both ends."""
    return [(low, low | PORT_MASK & ~mask) for low, mask in _local_blocks(policy)]


def rule_of(policy: Policy, place: int, match: Ternary, error: int = 0) -> Rule:
    """Return a policy's rule for these flows. `error`: the errno of a refusal, 0 for EPERM."""
    state = State.DERIVED if policy.derived else STATES[policy.action]
    return Rule(match, Entry(state, error, place, rank=place))
