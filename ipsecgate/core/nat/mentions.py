"""Which flows the rules of a hook distinguish: the destinations that they name.

A walk through the chains, with what has been compared on the way. It answers two questions. Where
can the rules' effect change from one destination to the next (`networks`)? Which destinations may
they translate (`services`)? Both answers may contain too much, never too little, unless a rule
compares the destination in a way that is not followed here; then the answer is None.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import Enum
from ipaddress import IPv4Address, IPv6Address, summarize_address_range

from ipsecgate.core.model.flow import PORT_MASK, Network
from ipsecgate.core.model.nat import (
    Bits,
    ChainName,
    Code,
    Constant,
    Element,
    Expression,
    Field,
    Hook,
    Load,
    Lookup,
    Ruleset,
    Swap,
    TableName,
    Translate,
    Verdict,
    Within,
)
from ipsecgate.core.model.value import value
from ipsecgate.core.nat.registers import SLOT
from ipsecgate.core.nat.translation import DEPTH, FAMILIES

MOST = 300_000  # networks, services, or rules on all ways to them; with more, the answer is None

Range = tuple[int, int]


class Part(Enum):
    """What of a flow is compared."""

    DADDR = "daddr"
    PROTO = "proto"
    DPORT = "dport"


@value
class Candidate:
    """Flows that rules may translate: to a network, of a protocol (0: any), to a range of ports."""

    network: Network
    proto: int = 0
    ports: Range = (0, PORT_MASK)
    target: Range | None = None  # the addresses that they may be led to, None: unknown


@value
class _Met:
    """What a packet has met on its way, as inclusive ranges."""

    daddr: Range
    proto: Range = (0, 255)
    dport: Range = (0, PORT_MASK)

    def narrowed(self, part: Part, low: int, high: int) -> _Met | None:
        """Return this with one part limited further, None if nothing is left."""
        have = getattr(self, part.value)
        both = max(have[0], low), min(have[1], high)
        return None if both[0] > both[1] else replace(self, **{part.value: both})


@value
class _Walk:
    """Where a walk is: in a rule of a table, before the rest of its expressions."""

    table: TableName
    rest: Sequence[Expression]
    depth: int


class TooMuchError(Exception):
    """The rules cannot be followed, or name too much."""


class Mentions:
    """The destinations that the NAT chains of one hook and one IP version name."""

    def __init__(self, ruleset: Ruleset, hook: Hook, version: int) -> None:
        self._ruleset, self._version = ruleset, version
        self._width = 32 if version == 4 else 128
        self._ranges: set[Range] = set()
        self._services: set[tuple[_Met, Range | None]] = set()
        self._seen: set[tuple[ChainName, _Met]] = set()
        self._failed = False
        self._rules = 0
        everything = _Met((0, (1 << self._width) - 1))
        try:
            for base in ruleset.bases:
                if base.nat and base.hook == hook and version in FAMILIES[base.table[0]]:
                    self._chain(base.table, base.name, everything, 0)
        except TooMuchError:
            self._failed = True

    @property
    def networks(self) -> set[Network] | None:
        """Return the networks that rules name as destination; None: they cannot be followed."""
        if self._failed:
            return None
        return {one for low, high in self._ranges for one in self._networks((low, high))}

    @property
    def services(self) -> set[Candidate] | None:
        """Return the flows that may be translated; None: they cannot be followed."""
        if self._failed:
            return None
        return {
            Candidate(network, _single(met.proto), met.dport, target)
            for met, target in self._services
            for network in self._networks(met.daddr)
        }

    def _networks(self, ends: Range) -> Iterator[Network]:
        if self._version == 4:
            yield from summarize_address_range(IPv4Address(ends[0]), IPv4Address(ends[1]))
        else:
            yield from summarize_address_range(IPv6Address(ends[0]), IPv6Address(ends[1]))

    def _chain(self, table: TableName, name: str, met: _Met, depth: int) -> None:
        if ((table, name), met) in self._seen:
            return
        self._seen.add(((table, name), met))
        if depth > DEPTH or len(self._seen) > MOST:
            raise TooMuchError
        for rule in self._ruleset.chains.get((table, name), ()):
            self._rule(table, rule.expressions, met, depth)

    def _rule(
        self, table: TableName, expressions: Sequence[Expression], met: _Met, depth: int
    ) -> None:
        self._rules += 1
        if self._rules > MOST:
            raise TooMuchError
        loads: dict[int, _Loaded] = {}
        for place, expression in enumerate(expressions):
            match expression:
                case Verdict(code=Code.JUMP | Code.GOTO, chain=chain):
                    self._chain(table, chain, met, depth + 1)
                    return
                case Translate(addresses=addresses):
                    self._services.add((met, _target(loads, addresses)))
                    return
                case Within() as within:
                    found = self._within(within, loads.get(within.register), met)
                    if found is not None:
                        # One of several ranges each: the rest of the rule applies to all of them.
                        for one in found:
                            self._rule(table, expressions[place + 1 :], one, depth)
                        return
                case Lookup() as lookup:
                    self._lookup(lookup, loads, met, _Walk(table, expressions[place + 1 :], depth))
                    return
                case Load() | Constant() | Bits() | Swap():
                    _load(loads, expression, self._width // 8)

    def _within(self, within: Within, loaded: _Loaded | None, met: _Met) -> list[_Met] | None:
        """Return what is left of a packet's possibilities, None if this does not concern them.

        Raises: TooMuchError if the destination is compared together with what follows it.
        """
        if loaded is None or loaded.part is None:
            return None
        if within.size > loaded.size:
            if loaded.part is Part.DADDR:
                raise TooMuchError
            return None
        ranges = [loaded.widened(low, high, within.size) for low, high in within.ranges]
        if loaded.part is Part.DADDR:
            self._mention(ranges)
        if within.invert:
            return None
        left = (met.narrowed(loaded.part, low, high) for low, high in ranges)
        return [one for one in left if one is not None]

    def _mention(self, ranges: Sequence[Range]) -> None:
        self._ranges.update(ranges)
        if len(self._ranges) > MOST:
            raise TooMuchError

    def _lookup(self, lookup: Lookup, loads: dict[int, _Loaded], met: _Met, walk: _Walk) -> None:
        named = self._ruleset.sets.get((walk.table, lookup.set))
        if named is None or named.elements is None:
            keys = range(lookup.register, lookup.register + 4)
            if any(slot in loads and loads[slot].part is Part.DADDR for slot in keys):
                raise TooMuchError  # the set changes by itself
            self._rule(walk.table, walk.rest, met, walk.depth)
            return
        found: set[tuple[_Met, Verdict | None]] = set()
        for element in named.elements:
            left = self._element(element, lookup, loads, named.size, met)
            if left is not None and not lookup.invert:
                is_verdict = lookup.verdict and isinstance(element.data, Verdict)
                found.add((left, element.data if is_verdict else None))  # type: ignore[arg-type]
        if lookup.invert:
            found.add((met, None))
        for left, verdict in found:
            if verdict is None or verdict.code is Code.CONTINUE:
                self._rule(walk.table, walk.rest, left, walk.depth)
            elif verdict.chain:
                self._chain(walk.table, verdict.chain, left, walk.depth + 1)

    def _element(
        self, element: Element, lookup: Lookup, loads: dict[int, _Loaded], size: int, met: _Met
    ) -> _Met | None:
        """Return what is left of a packet's possibilities if an element of a set matches."""
        left: _Met | None = met
        at = 0
        while at < size and left is not None:
            loaded = loads.get(lookup.register + at // SLOT)
            width = SLOT if loaded is None else min(loaded.size, size - at)
            if loaded is not None and loaded.part is not None:
                low, high = (
                    int.from_bytes(raw[at : at + width], "big")
                    for raw in (element.low, element.high)
                )
                ends = loaded.widened(low, high, width)
                if loaded.part is Part.DADDR:
                    self._mention([ends])
                left = left.narrowed(loaded.part, *ends)
            at += width + SLOT - 1 & ~(SLOT - 1)
        return left


@value
class _Loaded:
    """What a register holds: the first bytes of a part of the flow, under a mask; None: others.

    `whole`: the size of the part, in bytes. `hidden`: the bits that the mask leaves out.
    """

    part: Part | None
    size: int
    whole: int = 0
    hidden: int = 0
    constant: int | None = None

    def widened(self, low: int, high: int, size: int) -> Range:
        """Return the values of the whole part whose first bytes lie between two."""
        rest, hidden = 8 * (self.whole - size), self.hidden >> 8 * (self.size - size)
        return low << rest, (high | hidden) << rest | (1 << rest) - 1


def _single(ends: Range) -> int:
    return ends[0] if ends[0] == ends[1] else 0


def _target(loads: dict[int, _Loaded], addresses: tuple[int, int] | None) -> Range | None:
    if addresses is None:
        return None
    low, high = (loads[slot].constant if slot in loads else None for slot in addresses)
    return None if low is None or high is None else (low, high)


def _load(loads: dict[int, _Loaded], expression: Load | Constant | Bits | Swap, width: int) -> None:
    """Note what a register holds. Raises: TooMuchError if that is a part in an unusual form."""
    match expression:
        case Load(to, source, size, at):
            loads[to] = _loaded(source, size, at, width)
        case Bits(to, register, mask, xor):
            loaded = loads.get(register)
            if loaded is None or loaded.part is None:
                loads[to] = _Loaded(None, len(mask))
                return
            bits = int.from_bytes(mask, "big")
            hidden = ~bits & (1 << 8 * len(mask)) - 1
            is_first_bits = not hidden & hidden + 1
            if any(xor) or not is_first_bits or len(mask) != loaded.size:
                if loaded.part is Part.DADDR:
                    raise TooMuchError
                loads[to] = _Loaded(None, len(mask))
                return
            loads[to] = replace(loaded, hidden=hidden)
        case Swap(to, register, size):
            if loads.get(register, _Loaded(None, 0)).part is Part.DADDR:
                raise TooMuchError
            loads[to] = _Loaded(None, size)
        case Constant(to, data):
            loads[to] = _Loaded(None, len(data), constant=int.from_bytes(data, "big"))


def _loaded(source: Field, size: int, at: int, width: int) -> _Loaded:
    begins = 16 if width == 4 else 24  # the destination in the network header
    if source is Field.NETWORK and at == begins and size <= width:
        return _Loaded(Part.DADDR, size, width)
    if source is Field.NETWORK and at + size > begins and at < begins + width:
        raise TooMuchError  # another part of the destination
    if source is Field.PROTO:
        return _Loaded(Part.PROTO, 1, 1)
    if source is Field.TRANSPORT and (at, size) == (2, 2):
        return _Loaded(Part.DPORT, 2, 2)
    return _Loaded(None, size)
