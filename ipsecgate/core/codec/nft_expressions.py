"""Decoder of the expressions of nftables' rules.

Rules of this module: an expression that it does not know becomes `Unclear`, one that may end the
rule in an unknown way `Anything`. Numbers are in network order; the data that expressions compare
is in the order of the registers.

Source: linux/netfilter/nf_tables.h; net/netfilter/nft_*.c.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import replace

from ipsecgate.core.codec.netlink import Message, Span
from ipsecgate.core.codec.xtables import Expressions, decode_match, decode_target
from ipsecgate.core.model.nat import (
    Anything,
    Bits,
    Choice,
    Code,
    Constant,
    Field,
    Kind,
    Load,
    Lookup,
    SetMark,
    Swap,
    Translate,
    Unclear,
    Untrack,
    Verdict,
    Within,
)

_INET = 1
_NUMBER = struct.Struct(">I")
_SLOTS = 20
MOST_CHOICES = 256  # backends among which a rule chooses; of more nothing is known
MOST_BYTES = 64  # of a value: NFT_DATA_VALUE_MAXLEN


class Attributes:
    """The attributes of a message, or those nested in one."""

    def __init__(self, message: Message) -> None:
        self._message = message
        self._found = message.attributes(0)

    def __contains__(self, kind: int) -> bool:
        return kind in self._found

    def raw(self, kind: int) -> bytes:
        """Return an attribute's payload, empty if it is absent."""
        start, end = self._found.get(kind, (0, 0))
        return self._message.data[start:end]

    def text(self, kind: int) -> str:
        """Return a string."""
        return self.raw(kind).rstrip(b"\0").decode(errors="replace")

    def number(self, kind: int) -> int:
        """Return a number in network order, 0 if it is absent. Raises: DecodeError."""
        at = self._message.payload(self._found, kind, 4, f"attribute {kind}")
        return 0 if at is None else int(_NUMBER.unpack_from(self._message.data, at)[0])

    def nested(self, kind: int) -> Attributes | None:
        """Return the attributes inside one. Raises: DecodeError."""
        span = self._found.get(kind)
        return None if span is None else self._inside(span)

    def elements(self) -> Iterator[Attributes]:
        """Yield the attributes inside each element of a list. Raises: DecodeError."""
        for _, span in self._message.items(0):
            yield self._inside(span)

    def data(self, kind: int) -> bytes:
        """Return the value inside an attribute. Raises: DecodeError."""
        inside = self.nested(kind)
        return b"" if inside is None else inside.raw(1)

    def slot(self, kind: int) -> int:
        """Return a register as a slot, beyond the last one if it is none. Raises: DecodeError."""
        register = self.number(kind)
        if 1 <= register <= 4:
            return (register - 1) * 4
        return register - 8 if 8 <= register < 8 + 16 else _SLOTS

    def slots(self, low: int, high: int) -> tuple[int, int] | None:
        """Return the registers of a range's ends, None if there is no range."""
        if low not in self:
            return None
        return self.slot(low), self.slot(high if high in self else low)

    def _inside(self, span: Span) -> Attributes:
        return Attributes(replace(self._message, start=span[0], end=span[1]))


def decode_expression(name: str, found: Attributes | None, family: int) -> Expressions:
    """Return the meaning of an expression of a table of `family` (NFPROTO_*).

    Raises: DecodeError.
    """
    if name in _NEUTRAL:
        return []
    if found is None:
        return [Untrack()] if name == "notrack" else _without_data(name)
    if name in ("match", "target"):
        decode = decode_match if name == "match" else decode_target
        what, revision, info = found.text(1), found.number(2), found.raw(3)
        if family == _INET:
            return [Unclear(what) if name == "match" else Anything(what)]
        return decode(what, revision, info, family)
    decoder = _DECODERS.get(name)
    return decoder(found) if decoder is not None else _unknown(name)


def verdict_of(data: Attributes) -> Verdict | None:
    """Return the verdict that data holds, None if it holds a value. Raises: DecodeError."""
    inside = data.nested(2)
    if inside is None:
        return None
    code = struct.unpack(">i", _NUMBER.pack(inside.number(1)))[0]
    if code not in set(Code):
        return Verdict(Code.QUEUE)
    return Verdict(Code(code), inside.text(2))


# Expressions that let every packet go on, and change nothing that a rule can load.
_NEUTRAL = frozenset({"counter", "log", "last"})
_ENDS = {"reject": Verdict(Code.DROP), "queue": Verdict(Code.QUEUE)}


def _unknown(name: str) -> Expressions:
    if name in _ENDS:
        return [_ENDS[name]]
    if name in ("tproxy", "synproxy", "fwd", "dup"):
        return [Anything(name)]
    return [Unclear(name)]


def _without_data(name: str) -> Expressions:
    if name == "masq":
        return [Translate(Kind.MASQUERADE)]
    if name == "redir":
        return [Translate(Kind.REDIRECT)]
    return _unknown(name)


def _immediate(found: Attributes) -> Expressions:
    data = found.nested(2)
    if data is None:
        return [Unclear("immediate")]
    verdict = verdict_of(data)
    if verdict is not None:
        return [verdict]
    return [Constant(found.slot(1), data.raw(1)[:MOST_BYTES])]


# NFT_META_* -> the field and its size
_META = {
    1: (Field.ETHERTYPE, 2), 3: (Field.MARK, 4), 4: (Field.IIF, 4), 5: (Field.OIF, 4),
    6: (Field.IIF_NAME, 16), 7: (Field.OIF_NAME, 16), 15: (Field.NFPROTO, 1),
    16: (Field.PROTO, 1), 21: (Field.IIF_GROUP, 4), 22: (Field.OIF_GROUP, 4),
    25: (Field.SECPATH, 1),
}  # fmt: skip
_MARK = 3


def _meta(found: Attributes) -> Expressions:
    key = found.number(2)
    if 3 in found:  # from a register
        return [SetMark(found.slot(3))] if key == _MARK else []
    if key not in _META:
        return [Unclear(f"meta {key}")]
    field, size = _META[key]
    return [Load(found.slot(1), field, size)]


_BASES = {1: Field.NETWORK, 2: Field.TRANSPORT}


def _payload(found: Attributes) -> Expressions:
    base, at, size = found.number(2), found.number(3), found.number(4)
    if 5 in found:  # written to the packet
        is_address = base == 1 and at + size > 8
        is_port = base == 2 and at < 4
        return [Translate(Kind.REWRITE)] if is_address or is_port else []
    if base not in _BASES or size > MOST_BYTES:
        return [Unclear("payload")]
    return [Load(found.slot(1), _BASES[base], size, at)]


_EQ, _NEQ, _LT, _LTE, _GT, _GTE = range(6)


def _cmp(found: Attributes) -> Expressions:
    op, data = found.number(2), found.data(3)
    number, size = int.from_bytes(data, "big"), len(data)
    largest = (1 << 8 * size) - 1
    ranges = {
        _EQ: (number, number), _NEQ: (number, number), _LT: (0, number - 1), _LTE: (0, number),
        _GT: (number + 1, largest), _GTE: (number, largest),
    }  # fmt: skip
    if op not in ranges or size > MOST_BYTES:
        return [Unclear("cmp")]
    return [Within(found.slot(1), size, (ranges[op],), op == _NEQ)]


def _range(found: Attributes) -> Expressions:
    low, high = found.data(3), found.data(4)
    if len(low) != len(high) or len(low) > MOST_BYTES:
        return [Unclear("range")]
    ends = int.from_bytes(low, "big"), int.from_bytes(high, "big")
    return [Within(found.slot(1), len(low), (ends,), found.number(2) == 1)]


def _bitwise(found: Attributes) -> Expressions:
    mask, xor = found.data(4), found.data(5)
    if found.number(6) or len(mask) != len(xor) or len(mask) > MOST_BYTES:
        return [Unclear("bitwise")]
    return [Bits(found.slot(2), found.slot(1), mask, xor)]


def _byteorder(found: Attributes) -> Expressions:
    size, unit = found.number(4), found.number(5)
    if unit not in (2, 4, 8) or not size or size > 16 or struct.pack("=H", 1) != b"\1\0":
        return [Unclear("byteorder")]
    return [Swap(found.slot(2), found.slot(1), size, unit)]


def _lookup(found: Attributes) -> Expressions:
    is_verdict = 3 in found and not found.number(3)
    to = found.slot(3) if 3 in found and not is_verdict else None
    invert = bool(found.number(5) & 1)
    return [Lookup(found.text(1), found.slot(2), to, invert, is_verdict)]


_SNAT, _DNAT = 0, 1


def _nat(found: Attributes) -> Expressions:
    kind = {_SNAT: Kind.SNAT, _DNAT: Kind.DNAT}.get(found.number(1), Kind.REWRITE)
    return [Translate(kind, found.slots(3, 4), found.slots(5, 6))]


def _masq(found: Attributes) -> Expressions:
    return [Translate(Kind.MASQUERADE, None, found.slots(2, 3))]


def _redir(found: Attributes) -> Expressions:
    return [Translate(Kind.REDIRECT, None, found.slots(1, 2))]


def _ct(found: Attributes) -> Expressions:
    if 4 in found:
        return []  # sets something of the connection, not of the packet
    if found.number(2) == 0 and 3 not in found:
        return [Load(found.slot(1), Field.STATE, 4)]
    return [Unclear(f"ct {found.number(2)}")]


def _numgen(found: Attributes) -> Expressions:
    count, offset = found.number(2), found.number(4)
    if not 0 < count <= MOST_CHOICES or offset + count > 1 << 32:
        return [Unclear("numgen")]
    values = tuple(struct.pack("=I", number) for number in range(offset, offset + count))
    return [Choice(found.slot(1), values)]


_RT_XFRM = 4


def _rt(found: Attributes) -> Expressions:
    if found.number(2) == _RT_XFRM:
        return [Load(found.slot(1), Field.IPSEC, 1)]
    return [Unclear("rt")]


_FIB_ADDRTYPE = 3
_FIB_SADDR, _FIB_DADDR = 1, 2


def _fib(found: Attributes) -> Expressions:
    by = {_FIB_SADDR: Field.SADDR_TYPE, _FIB_DADDR: Field.DADDR_TYPE}.get(found.number(3))
    if found.number(2) != _FIB_ADDRTYPE or by is None:
        return [Unclear("fib")]
    return [Load(found.slot(1), by, 4)]


_DECODERS: dict[str, Callable[[Attributes], Expressions]] = {
    "immediate": _immediate,
    "meta": _meta,
    "payload": _payload,
    "cmp": _cmp,
    "range": _range,
    "bitwise": _bitwise,
    "byteorder": _byteorder,
    "lookup": _lookup,
    "nat": _nat,
    "masq": _masq,
    "redir": _redir,
    "ct": _ct,
    "numgen": _numgen,
    "rt": _rt,
    "fib": _fib,
}
