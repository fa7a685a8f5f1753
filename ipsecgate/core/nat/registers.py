"""One rule and one packet: what the rule may do to it.

Rules of this module: what depends on unknown bits matches both ways, so a rule has several possible
ends. Nothing here raises for a rule that the kernel would accept, however odd.

Source: net/netfilter/nft_*.c.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from ipsecgate.core.model.flow import UDP
from ipsecgate.core.model.nat import (
    Anything,
    Bits,
    Choice,
    Code,
    Constant,
    Device,
    Element,
    Expression,
    Field,
    Load,
    Lookup,
    Packet,
    Rule,
    Ruleset,
    Set,
    SetMark,
    Swap,
    TableName,
    Translate,
    Unclear,
    Untrack,
    Verdict,
    Within,
)
from ipsecgate.core.model.value import value

SLOT = 4
_NEW = 8  # NF_CT_STATE_BIT(IP_CT_NEW)
_NAME = 16  # IFNAMSIZ
_ALL = 0xFFFF_FFFF
NFPROTO = {4: 2, 6: 10}  # NFPROTO_IPV4, NFPROTO_IPV6 by IP version
_PORTS = (6, UDP, 33, 132, 136)  # protocols whose header begins with the ports

Number = tuple[int, int]
"""A big-endian number of some bytes, and which of its bits are unknown."""
Registers = dict[int, Number]
"""The registers of which something is known, by slot."""


@value
class Next:
    """The rule ends; the next one follows."""


@value
class Mapped:
    """The rule translates. Ranges of addresses, as numbers, and of ports; None: unchanged.

    `unclear`: the range is unknown.
    """

    translate: Translate
    addresses: tuple[int, int] | None = None
    ports: tuple[int, int] | None = None
    unclear: bool = False


End = tuple[Next | Verdict | Mapped | Untrack | Anything, int | None]
"""How a rule may end, and the packet's mark then."""


def ends(
    rule: Rule, table: TableName, ruleset: Ruleset, fields: Fields, mark: int | None
) -> Iterator[End]:
    """Yield the possible ends of a rule for a packet with this mark."""
    yield from _Run(rule.expressions, table, ruleset, fields).run(0, {}, mark)


class _Run:
    def __init__(
        self,
        expressions: Sequence[Expression],
        table: TableName,
        ruleset: Ruleset,
        fields: Fields,
    ) -> None:
        self._expressions, self._table = expressions, table
        self._ruleset, self._fields = ruleset, fields

    def run(self, at: int, known: Registers, mark: int | None) -> Iterator[End]:
        """Yield the ends from one expression on. `known` is changed."""
        for place in range(at, len(self._expressions)):
            end = _end_of(self._expressions[place], known, self._fields.width)
            if end is not None:
                yield end, mark
                return
            match self._expressions[place]:
                case Choice(to, values):
                    for raw in values:
                        chosen = dict(known)
                        _set(chosen, to, len(raw), (int.from_bytes(raw, "big"), 0))
                        yield from self.run(place + 1, chosen, mark)
                    return
                case Lookup() as lookup:
                    yield from self._look_up(lookup, place, known, mark)
                    return
                case SetMark(register):
                    mark = None if register is None else _mark_in(known, register)
                case Unclear():
                    yield Next(), mark
                    known.clear()
                case Within() as within:
                    matches = _is_within(within, _get(known, within.register, within.size))
                    if matches is not True:
                        yield Next(), mark
                    if matches is False:
                        return
                case Load() | Constant() | Bits() | Swap() as expression:
                    self._compute(expression, known, mark)
        yield Next(), mark

    def _compute(
        self, expression: Load | Constant | Bits | Swap, known: Registers, mark: int | None
    ) -> None:
        match expression:
            case Load(to, source, size, at):
                number = self._fields.load(source, at, size, mark)
            case Constant(to, data):
                size, number = len(data), (int.from_bytes(data, "big"), 0)
            case Bits(to, register, mask, xor):
                size, bits = len(mask), int.from_bytes(mask, "big")
                value, unknown = _get(known, register, size)
                number = value & bits ^ int.from_bytes(xor, "big"), unknown & bits
            case Swap(to, register, size, unit):
                value, unknown = _get(known, register, size)
                number = _swapped(value, size, unit), _swapped(unknown, size, unit)
        _set(known, to, size, number)

    def _look_up(
        self, lookup: Lookup, place: int, known: Registers, mark: int | None
    ) -> Iterator[End]:
        """Yield the ends of a lookup: for each element that may be meant, and for none."""
        named = self._ruleset.sets.get((self._table, lookup.set))
        if named is None or named.elements is None:
            if lookup.verdict:
                yield Anything(f"set {lookup.set}"), mark
            yield Next(), mark
            yield from self.run(place + 1, {}, mark)
            return
        key = _get(known, lookup.register, named.size)
        found, may_miss = _find(named, key)
        if found if lookup.invert else may_miss:
            yield Next(), mark
        if lookup.invert:
            if may_miss:
                yield from self.run(place + 1, dict(known), mark)
            return
        if lookup.to is None and not lookup.verdict:
            found = found[:1]  # all lead to the same
        for element in found:
            yield from self._found(lookup, element, place, dict(known), mark)

    def _found(
        self, lookup: Lookup, element: Element, place: int, known: Registers, mark: int | None
    ) -> Iterator[End]:
        """Yield the ends of a lookup that has found an element."""
        data = element.data
        if lookup.verdict and isinstance(data, Verdict) and data.code is not Code.CONTINUE:
            yield _ended(data), mark
            return
        if lookup.to is not None and isinstance(data, bytes):
            _set(known, lookup.to, len(data), (int.from_bytes(data, "big"), 0))
        yield from self.run(place + 1, known, mark)


def _end_of(
    expression: Expression, known: Registers, width: int
) -> Next | Verdict | Mapped | Untrack | Anything | None:
    """Return how an expression ends its rule, None if it does not."""
    match expression:
        case Verdict():
            return _ended(expression)
        case Translate():
            return _mapped(expression, known, width)
        case Untrack() | Anything():
            return expression
    return None


def _ended(verdict: Verdict) -> Next | Verdict:
    return Next() if verdict.code in (Code.CONTINUE, Code.BREAK) else verdict


def _mapped(translate: Translate, known: Registers, width: int) -> Mapped:
    addresses = _range(translate.addresses, known, width)
    ports = _range(translate.ports, known, 2)
    unclear = (addresses is None and translate.addresses is not None) or (
        ports is None and translate.ports is not None
    )
    return Mapped(translate, addresses, ports, unclear)


def _range(registers: tuple[int, int] | None, known: Registers, size: int) -> Number | None:
    """Return the ends of a range, None if there are none or they are not known."""
    if registers is None:
        return None
    (low, low_unknown), (high, high_unknown) = (_get(known, one, size) for one in registers)
    return None if low_unknown or high_unknown else (low, high)


def _get(known: Registers, register: int, size: int) -> Number:
    value = unknown = 0
    count = -(-size // SLOT)
    for slot in range(register, register + count):
        more, more_unknown = known.get(slot, (0, _ALL))
        value, unknown = value << 32 | more, unknown << 32 | more_unknown
    rest = 8 * (count * SLOT - size)
    return value >> rest, unknown >> rest


def _set(known: Registers, register: int, size: int, number: Number) -> None:
    count = -(-size // SLOT)
    value, unknown = (part << 8 * (count * SLOT - size) for part in number)
    for slot in reversed(range(register, register + count)):
        known[slot] = value & _ALL, unknown & _ALL
        value, unknown = value >> 32, unknown >> 32


def _mark_in(known: Registers, register: int) -> int | None:
    value, unknown = _get(known, register, SLOT)
    return None if unknown else int.from_bytes(value.to_bytes(SLOT, "big"), sys.byteorder)


def _swapped(number: int, size: int, unit: int) -> int:
    raw = number.to_bytes(size, "big")
    units = (raw[begin : begin + unit][::-1] for begin in range(0, size, unit))
    return int.from_bytes(b"".join(units), "big")


def _is_within(within: Within, number: Number) -> bool | None:
    """Tell whether a number lies in one of the ranges; None: that depends on unknown bits."""
    value, unknown = number
    least, most = value & ~unknown, value | unknown
    if any(low <= least and most <= high for low, high in within.ranges):
        return not within.invert
    if all(high < least or most < low for low, high in within.ranges):
        return within.invert
    return None


def _find(named: Set, key: Number) -> tuple[list[Element], bool]:
    """Return the elements that a key may match, and whether it may match none."""
    found: list[Element] = []
    for element in named.elements or ():
        matches = _matches(element, key, named.size)
        if matches is not False:
            found.append(element)
        if matches:
            return found, False
    return found, True


def _matches(element: Element, key: Number, size: int) -> bool | None:
    """Tell whether a key matches an element, field by field; None: perhaps."""
    value, unknown = (part.to_bytes(size, "big") for part in key)
    at, result = 0, True
    for width in element.widths or (size,):
        part = slice(at, at + width)
        low, high, own, hidden = (
            int.from_bytes(raw[part], "big") for raw in (element.low, element.high, value, unknown)
        )
        least, most = own & ~hidden, own | hidden
        if most < low or high < least:
            return False
        result = result and low <= least and most <= high
        at += width
    return result or None


class Fields:
    """The bytes of a packet that rules can load, each with its unknown bits.

    `in_output`: the rules are those of OUTPUT, where a packet has no input device.
    """

    def __init__(self, packet: Packet, in_output: bool) -> None:
        self.width = len(packet.daddr.packed)
        is_v4 = self.width == 4
        known: dict[Field, tuple[bytes, bytes] | None] = {
            Field.NETWORK: _network_header(packet),
            Field.NFPROTO: _all(bytes((NFPROTO[packet.daddr.version],))),
            Field.ETHERTYPE: _all(b"\x08\x00" if is_v4 else b"\x86\xdd"),
            Field.STATE: _native(_NEW),
            Field.SADDR_TYPE: _native(packet.saddr_type),
            Field.DADDR_TYPE: _native(packet.daddr_type),
        }
        if packet.proto:
            known[Field.PROTO] = _all(bytes((packet.proto,)))
        if packet.proto in _PORTS:
            known[Field.TRANSPORT] = _ports(packet)
        if packet.ipsec is not None:
            known[Field.IPSEC] = _all(bytes((packet.ipsec,)))
        if packet.local:
            known[Field.SECPATH] = _all(b"\0")
        for source in (Field.IIF, Field.IIF_NAME, Field.IIF_GROUP):
            known[source] = _of_device(source, packet.iif)
        for source in (Field.OIF, Field.OIF_NAME, Field.OIF_GROUP):
            known[source] = _of_device(source, packet.oif)
        if in_output:
            nothing = {Field.IIF: _all(bytes(SLOT)), Field.IIF_NAME: _all(bytes(_NAME))}
            known |= {**nothing, Field.IIF_GROUP: None}
        self._known = known

    def load(self, source: Field, at: int, size: int, mark: int | None) -> Number:
        """Return some bytes of a field."""
        found = _native(mark) if source is Field.MARK else self._known.get(source)
        if found is None or at + size > len(found[0]):
            return 0, (1 << 8 * size) - 1
        value, unknown = (int.from_bytes(raw[at : at + size], "big") for raw in found)
        return value, unknown


def _all(raw: bytes) -> tuple[bytes, bytes]:
    """Return bytes of which every bit is known."""
    return raw, bytes(len(raw))


def _of_device(source: Field, device: Device | None) -> tuple[bytes, bytes] | None:
    if device is None:
        return None
    if source in (Field.IIF_NAME, Field.OIF_NAME):
        return _all(device.name.encode().ljust(_NAME, b"\0")[:_NAME])
    return _native(device.index if source in (Field.IIF, Field.OIF) else device.group)


def _native(number: int | None) -> tuple[bytes, bytes] | None:
    return None if number is None else _all(number.to_bytes(SLOT, sys.byteorder))


def _ports(packet: Packet) -> tuple[bytes, bytes]:
    ports = packet.sport, packet.dport
    values = b"".join(port.to_bytes(2, "big") for port in ports)
    return values, b"".join(bytes(2) if port else b"\xff\xff" for port in ports)


def _network_header(packet: Packet) -> tuple[bytes, bytes]:
    """Return the header, of which only the addresses and the protocol are known."""
    width = len(packet.daddr.packed)
    begins, proto_at = (12, 9) if width == 4 else (8, 6)
    value, unknown = bytearray(begins), bytearray(b"\xff" * begins)
    if packet.proto:
        value[proto_at], unknown[proto_at] = packet.proto, 0
    value += packet.saddr.packed if packet.saddr is not None else bytes(width)
    unknown += bytes(width) if packet.saddr is not None else b"\xff" * width
    hidden = 0 if packet.bits is None else (1 << 8 * width - packet.bits) - 1
    value += packet.daddr.packed
    unknown += hidden.to_bytes(width, "big")
    return bytes(value), bytes(unknown)
