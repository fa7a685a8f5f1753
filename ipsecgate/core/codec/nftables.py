"""Codec for nftables over netlink: tables, chains, rules, sets and their elements.

Rules of this module: bytes in, values out; it opens no socket. Numbers in attributes are in network
order. An expression that it does not know becomes `Unclear` or `Anything`, so only framing is
refused. The rules of iptables-nft are nftables' rules, too.

The tools (nft, iptables-save) are not needed. nft shows nothing of the matches that iptables
brought in, iptables-save nothing of native tables, and both print what the kernel gives them.

Source: linux/netfilter/nf_tables.h, nfnetlink.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace

from ipsecgate.core.codec.netlink import Message, encode_dump, encode_request, messages
from ipsecgate.core.codec.nft_expressions import (
    MOST_BYTES,
    Attributes,
    decode_expression,
    verdict_of,
)
from ipsecgate.core.model.nat import (
    BaseChain,
    ChainName,
    Element,
    Expression,
    Hook,
    Rule,
    SetName,
    TableName,
)
from ipsecgate.core.model.value import value

NETLINK_NETFILTER = 12
NFNLGRP_NFTABLES = 7
_SUBSYSTEM = 10 << 8
(NEWTABLE, GETTABLE, _, NEWCHAIN, GETCHAIN, _, NEWRULE, GETRULE, _, NEWSET, GETSET, _, NEWSETELEM,
 GETSETELEM, _, NEWGEN, GETGEN) = (_SUBSYSTEM | number for number in range(17))  # fmt: skip
_HEADER = struct.Struct("=BBH")  # struct nfgenmsg
_NUMBER = struct.Struct(">I")
_DORMANT = 1
_INET_FAMILIES = (1, 2, 10)
_FAMILY_NAMES = {1: "inet", 2: "ip", 10: "ip6"}
SET_INTERVAL, SET_TIMEOUT, SET_EVAL = 4, 16, 32
_END, _CATCH_ALL = 1, 2


@value
class SetHeader:
    """What is known of a set without its elements. `widths`: the fields of a concatenation."""

    name: SetName
    flags: int
    size: int
    widths: tuple[int, ...] = ()

    @property
    def is_fixed(self) -> bool:
        """Tell whether its elements come and go only with a notification."""
        return not self.flags & (SET_TIMEOUT | SET_EVAL)


def encode_list(kind: int, sequence: int) -> bytes:
    """Encode a request for all tables, chains, rules or sets (one of GET...)."""
    return encode_dump(kind, _HEADER.pack(0, 0, 0), sequence)


def encode_elements(name: SetName, sequence: int) -> bytes:
    """Encode a request for the elements of a set."""
    (family, table), own = name
    body = _HEADER.pack(family, 0, 0) + _text(1, table) + _text(2, own)
    return encode_dump(GETSETELEM, body, sequence)


def encode_generation(sequence: int) -> bytes:
    """Encode a request for the number of the ruleset's generation."""
    return encode_request(GETGEN, _HEADER.pack(0, 0, 0), sequence)


def decode_generation(datagram: bytes) -> Iterator[int]:
    """Yield the generation. Raises: DecodeError."""
    for message in messages(datagram):
        if message.type == NEWGEN:
            yield _attributes(message).number(1)


def decode_dormant(datagram: bytes) -> Iterator[TableName]:
    """Yield the tables that are switched off. Raises: DecodeError."""
    for message in messages(datagram):
        if message.type == NEWTABLE:
            found = _attributes(message)
            if found.number(2) & _DORMANT:
                yield _family(message), found.text(1)


def decode_bases(datagram: bytes) -> Iterator[BaseChain]:
    """Yield the chains that netfilter calls for IP packets. Raises: DecodeError."""
    for message in messages(datagram):
        if message.type != NEWCHAIN or _family(message) not in _INET_FAMILIES:
            continue
        found = _attributes(message)
        hook = found.nested(4)
        if hook is None or hook.number(1) not in set(Hook):
            continue
        priority = struct.unpack(">i", _NUMBER.pack(hook.number(2)))[0]
        yield BaseChain(
            (_family(message), found.text(1)),
            found.text(3),
            Hook(hook.number(1)),
            priority,
            nat=found.text(7) == "nat",
            drops=5 in found and found.number(5) == 0,
        )


def decode_rules(datagram: bytes) -> Iterator[tuple[ChainName, Rule]]:
    """Yield each rule with its chain, in their order. Raises: DecodeError."""
    for message in messages(datagram):
        family = _family(message) if message.type == NEWRULE else 0
        if family not in _INET_FAMILIES:
            continue
        found = _attributes(message)
        table, chain = found.text(1), found.text(2)
        handle = struct.unpack(">Q", found.raw(3).rjust(8, b"\0")[-8:])[0]
        expressions: list[Expression] = []
        listed = found.nested(4)
        for part in listed.elements() if listed is not None else ():
            name, data = part.text(1), part.nested(2)
            expressions += decode_expression(name, data, family)
        label = f"handle {handle} of chain {chain} in table {_FAMILY_NAMES[family]} {table}"
        yield ((family, table), chain), Rule(tuple(expressions), label)


def decode_sets(datagram: bytes) -> Iterator[SetHeader]:
    """Yield the sets. Raises: DecodeError."""
    for message in messages(datagram):
        if message.type != NEWSET or _family(message) not in _INET_FAMILIES:
            continue
        found = _attributes(message)
        description = found.nested(9)
        fields = description.nested(2) if description is not None else None
        widths = tuple(one.number(1) + 3 & ~3 for one in fields.elements()) if fields else ()
        name = (_family(message), found.text(1)), found.text(2)
        yield SetHeader(name, found.number(3), found.number(5), widths)


Item = tuple[bytes, bytes | None, int, object]
"""An element as dumped: its key, the end of its range, its flags, its data."""


def decode_elements(datagram: bytes) -> Iterator[Item]:
    """Yield the elements of a set as the kernel lists them (`elements_of`). Raises: DecodeError."""
    for message in messages(datagram):
        if message.type != NEWSETELEM:
            continue
        listed = _attributes(message).nested(3)
        for part in listed.elements() if listed is not None else ():
            key, end, data = part.nested(1), part.nested(10), part.nested(2)
            yield (
                key.raw(1) if key is not None else b"",
                end.raw(1) if end is not None else None,
                part.number(3),
                None if data is None else (verdict_of(data) or data.raw(1)),
            )


def elements_of(header: SetHeader, items: list[Item]) -> tuple[Element, ...] | None:
    """Return the elements of a set, None if they cannot be understood."""
    size = header.size
    if not 0 < size <= MOST_BYTES:
        return None
    found: list[Element] = []
    begun: tuple[bytes, object] | None = None
    is_list_of_ends = header.flags & SET_INTERVAL and not any(end for _, end, _, _ in items)
    for key, end, flags, data in sorted(items, key=lambda item: (item[0], not item[2] & _END)):
        if flags & _CATCH_ALL or (key and len(key) != size):
            continue
        if not is_list_of_ends:
            found.append(_element(key, end or key, data, header.widths if end else ()))
            continue
        if begun is not None:
            found.append(_element(begun[0], _before(key), begun[1]))
        begun = None if flags & _END else (key, data)
    if begun is not None:
        found.append(_element(begun[0], b"\xff" * size, begun[1]))
    for _, _, flags, data in items:
        if flags & _CATCH_ALL:
            found.append(_element(bytes(size), b"\xff" * size, data))
    if any(key and len(key) != size for key, _, _, _ in items):
        return None
    return tuple(found)


def _element(low: bytes, high: bytes, data: object, widths: tuple[int, ...] = ()) -> Element:
    return Element(low, high, data, widths)  # type: ignore[arg-type]


def _before(key: bytes) -> bytes:
    return max(0, int.from_bytes(key, "big") - 1).to_bytes(len(key), "big")


def _family(message: Message) -> int:
    return message.data[message.structure(_HEADER.size, "nfgenmsg")]


def _attributes(message: Message) -> Attributes:
    message.structure(_HEADER.size, "nfgenmsg")
    return Attributes(replace(message, start=message.start + _HEADER.size))


def _text(kind: int, text: str) -> bytes:
    raw = text.encode() + b"\0"
    return struct.pack("=HH", 4 + len(raw), kind) + raw.ljust(len(raw) + 3 & ~3, b"\0")
