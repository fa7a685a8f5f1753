"""The flows that stand for a policy: one for each part that a loaded connection is to protect.

policy 10.2.0.0/16, children 10.2.0.0/24 and 10.2.9.0/24    -> 10.2.0.1, 10.2.9.1
policy 10.2.0.0/16, child 10.0.0.0/8                        -> 10.2.0.1
policy 10.2.0.0/16, no child                                -> 10.2.0.1, and IKE says why not
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import replace

from ipsecgate.core.gate.gate import Gate
from ipsecgate.core.model.flow import Address, Flow, Network
from ipsecgate.core.model.ipsec import Action, ChildConfig
from ipsecgate.core.model.policy import Policy, derived_policies

_NEAR = 8  # addresses at the beginning of a network that are tried as its sample


class Samples:
    """One flow for each part of a policy that a loaded connection is to protect."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._known: dict[Policy, tuple[Flow, ...]] = {}
        self._of: tuple[object, ...] = ()  # the state of the gate that these belong to
        self._selectors = _Selectors(())

    def of(self, policy: Policy) -> tuple[Flow, ...]:
        """Return the flows of a policy; none if other policies decide about all of it."""
        self._refresh()
        if policy not in self._known:
            self._known[policy] = self._flows(self._parts(policy), policy.name)
        return self._known[policy]

    def of_children(self, children: Iterable[ChildConfig]) -> tuple[Flow, ...]:
        """Return the flows of children that policies have protected."""
        return self._flows(derived_policies(children), "")

    def _refresh(self) -> None:
        gate = self._gate
        now = (gate.policies, gate.ike.loaded, gate.protection.routing.addresses)
        if len(self._of) != len(now) or any(a is not b for a, b in zip(self._of, now, strict=True)):
            self._of = now
            self._known.clear()
            children = (one for one in gate.ike.loaded.children if not one.wildcard)
            self._selectors = _Selectors(derived_policies(children))

    def _parts(self, policy: Policy) -> Iterator[Policy]:
        """Yield what a policy has in common with each selector of the loaded connections."""
        if policy.derived:
            yield policy
            return
        selectors, loaded = self._selectors, self._gate.ike.loaded
        if policy.child is not None:
            named = (one for one in loaded.children if one.name.matches(policy.child))
            selectors = _Selectors(derived_policies(named))
        for network in policy.remote:
            whole = replace(policy, remote=(network,))
            parts = [_common(whole, one) for one in selectors.within(network)]
            found = [part for part in parts if part is not None]
            yield from found
            # The rest counts if a wider selector protects it, or if nothing protects any of it.
            if not found or loaded.children_for(whole.sample_flow(), None, policy):
                yield whole

    def _flows(self, parts: Iterable[Policy], name: str) -> tuple[Flow, ...]:
        found = (self._sample(part, name) for part in parts)
        return tuple(dict.fromkeys(flow for flow in found if flow is not None))

    def _sample(self, part: Policy, name: str) -> Flow | None:
        """Return a flow that this policy decides about, else one that another protects.

        Not one to the host's own address, and none if an exception takes all of it.
        """
        own, table = self._gate.protection.routing.addresses, self._gate.policy_table
        first, other = part.sample_flow(), None
        for address in _spread(part.remote[0]):
            flow = replace(first, daddr=address)
            policy = (table.policy_for(flow) or (0, None))[1]
            if flow.daddr in own or policy is None or policy.action is not Action.PROTECT:
                continue
            if policy.name == name:
                return flow
            other = other or flow
        return other


class _Selectors:
    """Policies of one network each, in the order of their networks."""

    def __init__(self, policies: Iterable[Policy]) -> None:
        self._policies = sorted(policies, key=lambda one: _bounds(one.remote[0])[0])
        self._first = [_bounds(one.remote[0])[0] for one in self._policies]

    def within(self, network: Network) -> Iterator[Policy]:
        """Yield those whose network lies within another."""
        first, last = _bounds(network)
        for policy in self._policies[bisect_left(self._first, first) :]:
            begin, end = _bounds(policy.remote[0])
            if begin > last:
                return
            if end <= last:
                yield policy


def _bounds(network: Network) -> tuple[tuple[int, int], tuple[int, int]]:
    first, last = int(network.network_address), int(network.broadcast_address)
    return (network.version, first), (network.version, last)


def _spread(network: Network) -> list[Address]:
    """Return some addresses of a network: the first ones, then one in each half of a half."""
    size = network.num_addresses
    if size <= 2:
        return list(network)
    far = (1 + (1 << bit) for bit in range(size.bit_length() - 1))
    places = dict.fromkeys((*range(1, _NEAR), *far))
    return [network[at] for at in places if at < size - 1]


def _common(one: Policy, other: Policy) -> Policy | None:
    """Return a policy for what two have in common, of the other's network; None: nothing."""
    if one.proto and other.proto and one.proto != other.proto:
        return None
    ports, local = (
        (max(a[0], b[0]), min(a[1], b[1]))
        for a, b in ((one.ports, other.ports), (one.local_ports, other.local_ports))
    )
    if ports[0] > ports[1] or local[0] > local[1]:
        return None
    proto = one.proto or other.proto
    return replace(one, remote=other.remote, proto=proto, ports=ports, local_ports=local)
