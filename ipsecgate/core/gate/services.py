"""Service addresses that the host's NAT rules lead to backends which must be protected.

The hooks see the service address, the packet gets the backend's. So both tables get entries for
the service's flows: in POLICY that of the backend's policy, in SPD a live one while every backend
that must be protected is covered. What is asked of IKE is asked for the backends.

Rule of this module: all possible backends count, so it does not matter which one netfilter takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_network

from ipsecgate.core.gate.routing import Routed, Routing
from ipsecgate.core.model.flow import Address, Flow, Network
from ipsecgate.core.model.ipsec import Action
from ipsecgate.core.model.nat import Service
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.model.value import value
from ipsecgate.core.tables.layout import Entry, Reason, State, flow_key
from ipsecgate.core.tables.policy_rules import matches
from ipsecgate.core.tables.table import Rule, Table, Ternary, better, port_masks, ternary
from ipsecgate.core.tables.verdict import verdict

SERVICE = 1  # the `id` of an entry of a service in the SPD table; all others have 0
LIVE_RANK, DEAD_RANK = 0, 1  # before those of all kernel policies
ANY_MARK = 0xFFFF_FFFF  # a mask for the whole mark


@value
class _Protected:
    """A service with backends that must be protected, and the place of their first policy."""

    service: Service
    place: int
    backends: tuple[tuple[Address, int, bool], ...]  # address, port, whether the policy is derived


class Services:
    """The services in force."""

    def __init__(self) -> None:
        self._services: tuple[Service, ...] = ()
        self._protected: tuple[_Protected, ...] = ()
        self._by_address: dict[Address, list[_Protected]] = {}
        self._assigned: set[Service] = set()  # those with rules in the SPD table

    @property
    def networks(self) -> tuple[Network, ...]:
        """Return the addresses whose source routing must resolve."""
        return tuple(map(ip_network, self._by_address))

    def resolved(self, services: Iterable[Service]) -> None:
        """Take the services that the NAT rules make; `judge` follows."""
        self._services = tuple(services)

    def judge(self, policies: Sequence[Policy]) -> Mapping[int, list[Ternary]]:
        """Find the services with protected backends; return what they match, by policy's place."""
        judged = (_judge(service, policies) for service in self._services)
        self._protected = tuple(one for one in judged if one is not None)
        self._by_address = {}
        found: dict[int, list[Ternary]] = {}
        for one in self._protected:
            self._by_address.setdefault(one.service.daddr, []).append(one)
            found.setdefault(one.place, []).extend(_matches(one.service))
        return found

    def backends(self, flow: Flow, source: Address | None) -> tuple[Flow, ...]:
        """Return the flows of a service's protected backends; none if a flow is of no service."""
        for one in self._by_address.get(flow.daddr, ()):
            low, high = one.service.ports
            if one.service.proto == flow.proto and low <= flow.dport <= high:
                return tuple(
                    replace(flow, daddr=address, dport=port or flow.dport, saddr=source)
                    for address, port, _ in one.backends
                )
        return ()

    def rule_for(self, flow: Flow) -> str:
        """Return the NAT rules that translate a service's flow, for a message."""
        found = self._by_address.get(flow.daddr, ())
        return next((one.service.rule for one in found if one.service.proto == flow.proto), "")

    def spd_rules(self, table: Table, routing: Routing) -> Iterator[tuple[Service, list[Rule]]]:
        """Yield the rules of each service for the SPD table, none for one that is gone."""
        current = {one.service for one in self._protected}
        for gone in self._assigned - current:
            yield gone, []
        self._assigned = current
        for one in self._protected:
            yield one.service, _rules(one, table, routing)


def _judge(service: Service, policies: Sequence[Policy]) -> _Protected | None:
    place = len(policies)
    backends = []
    for address, port in service.backends:
        at = _policy_for(policies, address, service.proto, port or service.ports[0])
        if at is None or policies[at].action is Action.BYPASS:
            continue
        place = min(place, at)
        backends.append((address, port, policies[at].derived))
    return _Protected(service, place, tuple(backends)) if backends else None


def _policy_for(policies: Sequence[Policy], address: Address, proto: int, port: int) -> int | None:
    key = flow_key(Flow(address, proto, port))
    for place, policy in enumerate(policies):
        if any(match.matches(key) for match in matches(policy)):
            return place
    return None


def _matches(service: Service) -> list[Ternary]:
    network = ip_network(service.daddr)
    return [
        ternary(network, proto=service.proto, dport=block) for block in port_masks(*service.ports)
    ]


def _rules(one: _Protected, table: Table, routing: Routing) -> list[Rule]:
    """Return a service's rules: dead, and live in front of that for flows from routing's source."""
    service = one.service
    dead = Entry(State.DEAD, id=SERVICE, rank=DEAD_RANK)
    rules = [Rule(match, dead) for match in _matches(service)]
    first = routing.route(Flow(service.daddr, service.proto, service.ports[0]))
    source = first.flow.saddr
    if first.reason is not None or source is None or first.again is not None:
        return rules
    ends: list[int] = []
    entry = _kernel_entry(table, first.flow)
    if entry is not None and entry.state is State.DEAD:
        return rules  # the kernel looks the service up, too, before it translates
    for address, port, derived in one.backends:
        flow = Flow(address, service.proto, port or service.ports[0], saddr=source)
        routed = routing.route(flow)
        if routed.reason is not None or not _is_covered(table, routed, derived=derived):
            return rules
        found = (_kernel_entry(table, flow) for flow in routed.lookups)
        ends += [entry.deadline for entry in found if entry is not None and entry.deadline]
    live = Entry(State.LIVE, id=SERVICE, deadline=min(ends, default=0), rank=LIVE_RANK)
    network, src = ip_network(service.daddr), ip_network(source)
    return [
        *(
            Rule(
                ternary(network, src=src, proto=service.proto, dport=block, mark=(0, ANY_MARK)),
                live,
            )
            for block in port_masks(*service.ports)
        ),
        *rules,
    ]


def _is_covered(table: Table, routed: Routed, *, derived: bool) -> bool:
    def state_of(flow: Flow) -> State | None:
        entry = _kernel_entry(table, flow)
        return None if entry is None else entry.state

    tunneled = routed.path is not None and routed.path.is_tunneled
    found = verdict(routed.lookups, state_of, derived=derived, tunneled=tunneled)
    return found < Reason.REFUSE_UNCOVERED


def _kernel_entry(table: Table, flow: Flow) -> Entry | None:
    """Return what the SPD table says of a flow, without the entries of services."""
    key, best = flow_key(flow), None
    for mask, row in table.rows.items():
        entry = row.get(key.masked(mask))
        if entry is not None and entry.id != SERVICE and (best is None or better(entry, best)):
            best = entry
    return best
