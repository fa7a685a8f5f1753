"""What another list of policies would open and close: two lists compared as sets of flows.

    cut      the destinations at both ends of each network: the same policies name a whole piece
    compare  within a piece: protocols, ports and local ports, cut in the same way; the first match
             of each list decides each cell
    join     cells that differ in the same way, into networks and ranges

Rules of this module: exact, and about flows, not about text: a list that is written in another way,
or in another order without effect, has no difference. A flow matches as in the hooks
(`core.tables.policy_rules`). Exemptions (loopback, DHCP, IKE) are the same for both lists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, summarize_address_range
from itertools import pairwise

from ipsecgate.core.model.flow import ANY_PORT, PORT_MASK, Flow, Network, unmap
from ipsecgate.core.model.ipsec import Action
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.model.value import value
from ipsecgate.core.tables.layout import Key, address_from_bits
from ipsecgate.core.tables.policy_rules import local_ranges
from ipsecgate.core.tables.table import Ternary

Range = tuple[int, int]  # both ends included
_WIDTHS = {4: 32, 6: 128}


class Effect(IntEnum):
    """What a list does with a flow, the more open first."""

    ALLOW = 0  # lets it go in clear
    PROTECT_OR_PASS = 1  # protects it, unless a pass-through connection lets it go in clear
    PROTECT = 2
    REFUSE = 3


@value
class Judgement:
    """A list's effect on a flow, by the policy of this name; None: by the default."""

    effect: Effect
    policy: str | None = None
    child: str | None = None  # that a protect policy names


@value
class Policies:
    """A list of policies, and whether flows that none of them names are refused."""

    policies: tuple[Policy, ...]
    deny: bool = False

    def judge(self, place: int | None) -> Judgement:
        """Return what the policy at a place does; None: what the default does."""
        if place is None:
            return Judgement(Effect.REFUSE if self.deny else Effect.ALLOW)
        policy = self.policies[place]
        effect = {
            Action.BYPASS: Effect.ALLOW,
            Action.PROTECT: Effect.PROTECT_OR_PASS if policy.derived else Effect.PROTECT,
            Action.DISCARD: Effect.REFUSE,
        }[policy.action]
        return Judgement(effect, policy.name, policy.child)


@value
class Protocols:
    """A set of protocols: these, or with `others` all but these."""

    numbers: frozenset[int] = frozenset()
    others: bool = True

    def __contains__(self, proto: int) -> bool:
        return (proto in self.numbers) is not self.others


@value
class Difference:
    """The flows of these networks, protocols and ports, which the lists judge differently.

    `local_ports`: of the socket, where 0 is one that is not bound.
    """

    before: Judgement
    after: Judgement
    networks: tuple[Network, ...]
    protocols: Protocols
    ports: Range = ANY_PORT
    local_ports: Range = ANY_PORT

    @property
    def opens(self) -> bool:
        """Tell whether more may leave than before."""
        return self.after.effect < self.before.effect

    @property
    def closes(self) -> bool:
        """Tell whether less may leave than before."""
        return self.after.effect > self.before.effect

    def contains(self, flow: Flow) -> bool:
        """Tell whether a flow is among these."""
        daddr = unmap(flow.daddr)
        return (
            flow.proto in self.protocols
            and self.ports[0] <= flow.dport <= self.ports[1]
            and self.local_ports[0] <= flow.sport <= self.local_ports[1]
            and any(daddr in network for network in self.networks)
        )

    def overlaps(self, match: Ternary) -> bool:
        """Tell whether some flow among these may match a ternary."""
        value, mask = match.value, match.mask
        if mask.proto and value.proto not in self.protocols:
            return False
        if not _meet(self.ports, _range(value.dport, mask.dport, PORT_MASK)) or not _meet(
            self.local_ports, _range(value.sport, mask.sport, PORT_MASK)
        ):
            return False
        return any(_meets(network, value, mask) for network in self.networks)


def _meets(network: Network, value: Key, mask: Key) -> bool:
    if mask.family and value.family != network.version:
        return False
    low, high = _range(value.daddr, mask.daddr, (1 << 128) - 1)
    ends = (address_from_bits(end, network.version) for end in (low, high))
    return _meet((int(network[0]), int(network[-1])), (int(next(ends)), int(next(ends))))


def _range(value: int, mask: int, full: int) -> Range:
    return value & mask, value | full & ~mask


def _meet(one: Range, other: Range) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


@value
class _Cell:
    """A difference without its addresses."""

    before: Judgement
    after: Judgement
    protocols: Protocols
    ports: Range
    local_ports: Range


def differences(old: Policies, new: Policies) -> list[Difference]:
    """Return the flows that two lists judge differently; what opens comes first.

    Two protect policies that name other children judge differently, too, but neither opens nor
    closes anything. The result's flows are disjoint.
    """
    compare = _Comparison(old, new)
    found: dict[tuple[int, _Cell], list[Range]] = {}
    for version in _WIDTHS:
        for piece, before, after in _pieces(version, old.policies, new.policies):
            for cell in compare.cells(before, after):
                _append(found.setdefault((version, cell), []), piece)
    joined = [
        Difference(
            cell.before, cell.after, _networks(version, pieces), cell.protocols, cell.ports,
            cell.local_ports,
        )
        for (version, cell), pieces in found.items()
    ]  # fmt: skip
    return sorted(joined, key=lambda one: (not one.opens, not one.closes))


Places = tuple[int, ...]


def _pieces(
    version: int, old: Sequence[Policy], new: Sequence[Policy]
) -> Iterator[tuple[Range, Places, Places]]:
    """Yield ranges of destinations, and the places of each list's policies for all of a range."""
    changes: dict[int, list[tuple[int, int, int]]] = {0: [], 1 << _WIDTHS[version]: []}
    for side, policies in enumerate((old, new)):
        for place, policy in enumerate(policies):
            for network in policy.remote:
                if network.version == version:
                    changes.setdefault(int(network[0]), []).append((side, place, 1))
                    changes.setdefault(int(network[-1]) + 1, []).append((side, place, -1))
    here: tuple[Counter[int], Counter[int]] = Counter(), Counter()
    for low, end in pairwise(sorted(changes)):
        for side, place, step in changes[low]:
            here[side][place] += step
            if not here[side][place]:
                del here[side][place]
        yield (low, end - 1), _effective(here[0], old), _effective(here[1], new)


def _effective(places: Iterable[int], policies: Sequence[Policy]) -> Places:
    """Return places in order, without those behind a policy that names every flow."""
    found: list[int] = []
    for place in sorted(places):
        found.append(place)
        policy = policies[place]
        if not policy.proto and policy.ports == policy.local_ports == ANY_PORT:
            break
    return tuple(found)


class _Comparison:
    """Compares what two lists do with the flows to some destinations."""

    def __init__(self, old: Policies, new: Policies) -> None:
        self._old = old
        self._new = new
        self.cells = lru_cache(maxsize=1 << 14)(self._cells)

    def _cells(self, before: Places, after: Places) -> list[_Cell]:
        old = [self._old.policies[place] for place in before]
        new = [self._new.policies[place] for place in after]
        named = {policy.proto for policy in (*old, *new)} - {0}
        by_ports: dict[tuple[Judgement, Judgement, Range, Range], set[int]] = {}
        for proto in (*named, 0):  # 0: all others
            one = [
                (place, p) for place, p in zip(before, old, strict=True) if p.proto in (0, proto)
            ]
            two = [(place, p) for place, p in zip(after, new, strict=True) if p.proto in (0, proto)]
            for ports, local_ports, judged in self._of_protocol(one, two):
                by_ports.setdefault((*judged, ports, local_ports), set()).add(proto)
        return [
            _Cell(before, after, _protocols(protos, named), ports, local_ports)
            for (before, after, ports, local_ports), protos in by_ports.items()
        ]

    def _of_protocol(
        self, old: list[tuple[int, Policy]], new: list[tuple[int, Policy]]
    ) -> Iterator[tuple[Range, Range, tuple[Judgement, Judgement]]]:
        """Yield the ports, local ports and judgements that differ, of one protocol."""
        policies = [policy for _, policy in (*old, *new)]
        local_cuts = _cuts(part for policy in policies for part in local_ranges(policy))
        rows: dict[tuple[Range, tuple[Judgement, Judgement]], list[Range]] = {}
        for ports in _cuts(policy.ports for policy in policies):
            row: dict[tuple[Judgement, Judgement], list[Range]] = {}
            for local in local_cuts:
                judged = (
                    self._old.judge(_first(old, ports, local)),
                    self._new.judge(_first(new, ports, local)),
                )
                if _differ(*judged):
                    _append(row.setdefault(judged, []), local)
            for judged, parts in row.items():
                for local in parts:
                    _append(rows.setdefault((local, judged), []), ports)
        for (local, judged), parts in rows.items():
            for ports in parts:
                yield ports, local, judged


def _first(policies: list[tuple[int, Policy]], ports: Range, local: Range) -> int | None:
    """Return the place of the first policy that names a cell, all of whose flows are alike."""
    for place, policy in policies:
        if policy.ports[0] <= ports[0] <= policy.ports[1] and any(
            low <= local[0] <= high for low, high in local_ranges(policy)
        ):
            return place
    return None


def _differ(before: Judgement, after: Judgement) -> bool:
    if before.effect != after.effect:
        return True
    return before.effect is Effect.PROTECT and before.child != after.child


def _cuts(ranges: Iterable[Range]) -> list[Range]:
    """Return all ports, cut at both ends of every range."""
    ends = {0, PORT_MASK + 1}
    for low, high in ranges:
        ends |= {low, high + 1}
    return [(low, end - 1) for low, end in pairwise(sorted(ends))]


def _append(ranges: list[Range], more: Range) -> None:
    """Append a range to others, all of which are below it."""
    if ranges and ranges[-1][1] + 1 == more[0]:
        ranges[-1] = ranges[-1][0], more[1]
    else:
        ranges.append(more)


def _protocols(protos: set[int], named: set[int]) -> Protocols:
    if 0 in protos:
        return Protocols(frozenset(named - protos))
    return Protocols(frozenset(protos), others=False)


def _networks(version: int, pieces: list[Range]) -> tuple[Network, ...]:
    found: list[Network] = []
    for low, high in pieces:
        if version == 4:
            found += summarize_address_range(IPv4Address(low), IPv4Address(high))
        else:
            found += summarize_address_range(IPv6Address(low), IPv6Address(high))
    return tuple(found)
