"""What the NAT rules of a network namespace may make of a packet's ends.

    prerouting, output     the destination, before routing (locally made packets: routed again)
    postrouting            the source, before XFRM transforms the packet; if it changed, the kernel
                           looks the XFRM policy up again

Rules of this module: the answer has every end that is possible. It is None ("unknown") if that can
be anything. A rule whose match is not understood may match or not.

Not modelled: a connection that was tracked before a rule came or went keeps its translation; a
helper (FTP) may translate by itself; a program at tc or XDP may, too; and where the source port
clashes with that of another connection, the kernel chooses another.

Source: net/netfilter/nf_nat_core.c: nf_nat_inet_fn(); nf_nat_proto.c: nf_nat_ipv4_out(),
nf_xfrm_me_harder(); nf_tables_core.c.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_network
from itertools import groupby, permutations

from ipsecgate.core.model.flow import PORT_MASK, Address
from ipsecgate.core.model.nat import (
    Anything,
    BaseChain,
    ChainName,
    Code,
    Hook,
    Kind,
    Lookup,
    Packet,
    Rule,
    Ruleset,
    SetMark,
    TableName,
    Translate,
    Translation,
    Untrack,
    Verdict,
)
from ipsecgate.core.nat.registers import End, Fields, Mapped, Next, ends

DEPTH = 16  # NFT_JUMP_STACK_SIZE
MOST = 300_000  # ends of rules that are looked at for one packet
PEERS = 4  # chains of one priority, of which every order is tried
FAMILIES = {2: (4,), 10: (6,), 1: (4, 6)}  # NFPROTO_IPV4, IPV6, INET -> IP versions
_LOOPBACK: dict[int, Address] = {4: IPv4Address("127.0.0.1"), 6: IPv6Address("::1")}

Marks = set[int | None]


class UnknownError(Exception):
    """The rules may do anything to the packet."""


class Nat:
    """The NAT rules of one network namespace."""

    def __init__(self, ruleset: Ruleset) -> None:
        self.ruleset = ruleset
        starts = [(base.table, base.name) for base in ruleset.bases if not base.nat]
        other = [
            expression
            for chain in _reachable(ruleset, starts)
            for rule in ruleset.chains.get(chain, ())
            for expression in rule.expressions
        ]
        self._marks_elsewhere = any(isinstance(one, SetMark | Anything) for one in other)
        self._untracks = any(isinstance(one, Untrack | Anything) for one in other)
        self._rewrites = any(isinstance(one, Translate) for one in other)

    @property
    def translates(self) -> bool:
        """Tell whether there is any NAT rule."""
        return self.ruleset.translates

    def destinations(self, packet: Packet) -> frozenset[Translation] | None:
        """Return what the destination may become; None: anything."""
        hook = Hook.OUTPUT if packet.local else Hook.PREROUTING
        network = ip_network((packet.daddr, packet.daddr.max_prefixlen))
        if packet.bits is not None:
            network = network.supernet(new_prefix=packet.bits)
        ports = (packet.dport, packet.dport) if packet.dport else (0, PORT_MASK)
        return self._ask(hook, packet, Translation(network[0], network[-1], ports))

    def sources(self, packet: Packet) -> frozenset[Translation] | None:
        """Return what the source may become, which the packet must have; None: anything.

        `packet.daddr` is the destination after DNAT. Raises: ValueError.
        """
        if packet.saddr is None:
            raise ValueError(f"the source of {packet} is not known")
        ports = (packet.sport, packet.sport) if packet.sport else (0, PORT_MASK)
        unchanged = Translation(packet.saddr, packet.saddr, ports)
        found = self._ask(Hook.POSTROUTING, packet, unchanged)
        # What a rule makes of the mark here matters to nobody.
        return None if found is None else frozenset(replace(one, mark=None) for one in found)

    def _ask(
        self, hook: Hook, packet: Packet, unchanged: Translation
    ) -> frozenset[Translation] | None:
        bases = [
            base
            for base in self.ruleset.bases
            if base.nat and base.hook == hook and packet.daddr.version in FAMILIES[base.table[0]]
        ]
        if self._rewrites or max(Counter(map(_priority, bases)).values(), default=0) > PEERS:
            return None
        if not bases:
            mark = None if self._marks_elsewhere else packet.mark
            return frozenset((replace(unchanged, mark=mark),))
        walk = _Walk(self.ruleset, hook, packet, unchanged)
        try:
            remaining = walk.bases(bases, {None if self._marks_elsewhere else packet.mark})
        except UnknownError:
            return None
        if self._untracks:
            remaining.add(packet.mark)
        return frozenset((*walk.found, *(replace(unchanged, mark=mark) for mark in remaining)))


class _Walk:
    """One packet's way through the chains of a hook; `found` collects translations."""

    def __init__(
        self, ruleset: Ruleset, hook: Hook, packet: Packet, unchanged: Translation
    ) -> None:
        self.found: set[Translation] = set()
        self._ruleset, self._packet = ruleset, packet
        self._fields = Fields(packet, hook is Hook.OUTPUT)
        self._unchanged = unchanged
        self._ends_left = MOST
        self._seen: dict[tuple[TableName, str, int | None], tuple[Marks, Marks]] = {}

    def bases(self, bases: Iterable[BaseChain], marks: Marks) -> Marks:
        """Return the marks with which a packet may get past all chains untranslated.

        Of chains with one priority the kernel's order is not known, so every order counts.
        """
        for _, group in groupby(sorted(bases, key=_priority), _priority):
            marks = set().union(*(self._in_turn(order, marks) for order in permutations(group)))
        return marks

    def _in_turn(self, bases: Iterable[BaseChain], marks: Marks) -> Marks:
        for base in bases:
            marks = self._base(base, marks)
        return marks

    def _base(self, base: BaseChain, marks: Marks) -> Marks:
        """Return the marks with which a packet may pass a chain, by its policy or a verdict."""
        accepted, fallen = self._chain(base.table, base.name, marks, 0)
        return accepted if base.drops else accepted | fallen

    def _chain(self, table: TableName, name: str, marks: Marks, depth: int) -> tuple[Marks, Marks]:
        """Return the marks of accepted packets, and of those that reach the chain's end."""
        if depth > DEPTH:
            raise UnknownError
        accepted: Marks = set()
        fallen: Marks = set()
        for mark in marks:
            key = table, name, mark
            if key not in self._seen:
                self._seen[key] = self._rules(table, name, mark, depth)
            accepted |= self._seen[key][0]
            fallen |= self._seen[key][1]
        return accepted, fallen

    def _rules(
        self, table: TableName, name: str, mark: int | None, depth: int
    ) -> tuple[Marks, Marks]:
        accepted: Marks = set()
        left: Marks = set()  # the chain, by RETURN or a goto
        marks: Marks = {mark}
        for rule in self._ruleset.chains.get((table, name), ()):
            following: Marks = set()
            for end, after in self._ends(rule, table, marks):
                match end:
                    case Next():
                        following.add(after)
                    case Mapped():
                        self._translated(rule, end, after)
                    case Verdict(code=Code.ACCEPT | Code.DROP):
                        # Nothing is dropped before some expression has conntrack switched on.
                        accepted.add(after)
                    case Verdict(code=Code.RETURN):
                        left.add(after)
                    case Verdict(code=Code.JUMP | Code.GOTO as code, chain=chain):
                        done, back = self._chain(table, chain, {after}, depth + 1)
                        accepted |= done
                        (following if code is Code.JUMP else left).update(back)
                    case _:
                        raise UnknownError
            marks = following
            if not marks:
                break
        return accepted, marks | left

    def _ends(self, rule: Rule, table: TableName, marks: Marks) -> Iterator[End]:
        for mark in marks:
            for end in ends(rule, table, self._ruleset, self._fields, mark):
                self._ends_left -= 1
                if not self._ends_left:
                    raise UnknownError  # it would take too long
                yield end

    def _translated(self, rule: Rule, end: Mapped, mark: int | None) -> None:
        """Add a translation. Raises: UnknownError if its range is unknown."""
        kind, packet = end.translate.kind, self._packet
        low: Address | None = self._unchanged.low
        high: Address | None = self._unchanged.high
        if end.unclear or kind is Kind.REWRITE:
            raise UnknownError
        if kind is Kind.MASQUERADE:
            low = high = packet.masquerade
        elif kind is Kind.REDIRECT:
            low = high = _LOOPBACK[packet.daddr.version] if packet.local else None
        elif end.addresses is not None:
            low, high = (type(packet.daddr)(number) for number in end.addresses)
        if low is None or high is None or low > high:  # type: ignore[operator]
            raise UnknownError
        ports = end.ports or self._unchanged.ports
        if end.ports is None and kind in (Kind.SNAT, Kind.MASQUERADE):
            ports = 0, PORT_MASK
        self.found.add(Translation(low, high, ports, mark, rule.label))


def _priority(base: BaseChain) -> int:
    return base.priority


def _reachable(ruleset: Ruleset, starts: Iterable[ChainName]) -> set[ChainName]:
    """Return the chains that a packet may reach from some chains, these included."""
    found: set[ChainName] = set()
    due = list(starts)
    while due:
        table, name = due.pop()
        if (table, name) in found:
            continue
        found.add((table, name))
        for rule in ruleset.chains.get((table, name), ()):
            for expression in rule.expressions:
                if isinstance(expression, Verdict) and expression.chain:
                    due.append((table, expression.chain))
                elif isinstance(expression, Lookup) and expression.verdict:
                    named = ruleset.sets.get((table, expression.set))
                    elements = named.elements or () if named else ()
                    verdicts = (one.data for one in elements if isinstance(one.data, Verdict))
                    due += [(table, verdict.chain) for verdict in verdicts if verdict.chain]
    return found


def moved(packet: Packet, translation: Translation) -> Packet:
    """Return a packet with its destination translated to one address. Raises: ValueError."""
    if not translation.rule:
        return replace(packet, mark=translation.mark)
    low, high = translation.ports
    if translation.low != translation.high:
        raise ValueError(f"{translation} is a range")
    dport = low if low == high else 0
    return replace(packet, daddr=translation.low, bits=None, dport=dport, mark=translation.mark)
