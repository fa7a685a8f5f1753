"""The operator's policies as rules of the hooks' policy table."""

from __future__ import annotations

from ipsecgate.core.model.ipsec import Action
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.tables.layout import Entry, State
from ipsecgate.core.tables.table import Rule, Ternary, port_masks, ternary

STATES = {
    Action.PROTECT: State.PROTECT,
    Action.BYPASS: State.BYPASS,
    Action.DISCARD: State.DISCARD,
}


def matches(policy: Policy) -> list[Ternary]:
    """Return the flows that a policy names, as the hooks match them."""
    return [
        ternary(network, proto=policy.proto, dport=block)
        for network in policy.remote
        for block in port_masks(*policy.ports)
    ]


def rule_of(policy: Policy, place: int, match: Ternary, error: int = 0) -> Rule:
    """Return a policy's rule for these flows. `error`: the errno of a refusal, 0 for EPERM."""
    state = State.DERIVED if policy.derived else STATES[policy.action]
    return Rule(match, Entry(state, error, place, rank=place))
