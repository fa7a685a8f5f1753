"""Decoder of the matches and targets of iptables, which nftables' compatibility layer also carries.

Rules of this module: bytes in, expressions out. What it does not know, or knows in another
revision, becomes `Unclear` (a match) or `Anything` (a target); nothing is refused. Numbers in these
structures are in host order, except addresses and the ports of address ranges.

Source: linux/netfilter/xt_*.h, linux/netfilter_ipv4/ipt_*.h, linux/netfilter/nf_nat.h.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterable

from ipsecgate.core.model.flow import PORT_MASK
from ipsecgate.core.model.nat import (
    AddressType,
    Anything,
    Bits,
    Code,
    Constant,
    Expression,
    Field,
    Kind,
    Load,
    SetMark,
    Translate,
    Unclear,
    Untrack,
    Verdict,
    Within,
)

IPV4, IPV6 = 2, 10  # NFPROTO_*
MAP_IPS, PROTO_SPECIFIED = 1, 2  # NF_NAT_RANGE_*
_WORD = 4
# Targets after which a packet continues unchanged.
_NEUTRAL = frozenset({"LOG", "NFLOG", "TRACE", "TCPMSS", "CHECKSUM", "DSCP", "TOS", "TTL", "HL",
                      "CLASSIFY", "SECMARK", "CONNSECMARK", "AUDIT", "LED", "IDLETIMER", "RATEEST",
                      "TCPOPTSTRIP", "SET"})  # fmt: skip
_ENDS = {"DROP": Code.DROP, "REJECT": Code.DROP, "ACCEPT": Code.ACCEPT, "RETURN": Code.RETURN}

Expressions = list[Expression]


def compared(
    source: Field,
    size: int,
    ranges: Iterable[tuple[int, int]],
    invert: bool = False,
    at: int = 0,
) -> Expressions:
    """Return the expressions that match some bytes of a field, as a big-endian number."""
    return [Load(0, source, size, at), Within(0, size, tuple(ranges), invert)]


def masked(source: Field, at: int, mask: bytes, value: bytes, invert: bool = False) -> Expressions:
    """Return the expressions that match the bytes of a field under a mask."""
    number = int.from_bytes(value, "big")
    size = len(mask)
    return [
        Load(0, source, size, at),
        Bits(0, 0, mask, bytes(size)),
        Within(0, size, ((number, number),), invert),
    ]


def decode_match(name: str, revision: int, info: bytes, family: int) -> Expressions:
    """Return a match as expressions."""
    decode = _MATCHES.get((name, revision))
    if decode is not None:
        try:
            return decode(info, family)
        except (struct.error, ValueError):
            pass
    return [Unclear(f"match {name}")]


def decode_target(name: str, revision: int, info: bytes, family: int) -> Expressions:
    """Return a target as expressions."""
    if name in _NEUTRAL:
        return []
    if name in _ENDS:
        return [Verdict(_ENDS[name])]
    if name in ("NOTRACK", "CT"):
        return [Unclear("target CT"), Untrack()]
    try:
        if name in _NAT:
            return _translate(name, revision, info, family)
        if name == "MARK" and revision == 2:
            mark, mask = struct.unpack_from("=II", info)
            return [
                Load(0, Field.MARK, _WORD),
                Bits(0, 0, _word(~mask & 0xFFFF_FFFF), _word(mark)),
                SetMark(0),
            ]
        if name == "CONNMARK":
            mode = info[12]
            return [SetMark(None)] if mode == 2 else []  # XT_CONNMARK_RESTORE
    except (struct.error, IndexError):
        pass
    return [Anything(f"target {name}")]


# --- targets -------------------------------------------------------------------------------------

_NAT = {"SNAT": Kind.SNAT, "DNAT": Kind.DNAT, "NETMAP": Kind.DNAT,
        "MASQUERADE": Kind.MASQUERADE, "REDIRECT": Kind.REDIRECT}  # fmt: skip


def _translate(name: str, revision: int, info: bytes, family: int) -> Expressions:
    if family == IPV4 and revision == 0:
        # struct nf_nat_ipv4_multi_range_compat
        flags, low, high, *ports = struct.unpack_from("=4xI4s4s2s2s", info)
    else:
        # struct nf_nat_range, and nf_nat_range2 with the base of shifted ports after it
        flags, low, high, *ports = struct.unpack_from("=I16s16s2s2s", info)
        if family == IPV4:
            low, high = low[:4], high[:4]
    kind = _NAT[name]
    addresses = ports_at = None
    expressions: Expressions = []
    if name == "NETMAP":
        kind = Kind.DNAT  # in the hooks for destinations; in the others it translates the source
    if flags & MAP_IPS and kind in (Kind.SNAT, Kind.DNAT):
        addresses = 0, 4
        expressions += [Constant(0, low), Constant(4, high)]
    if flags & PROTO_SPECIFIED:
        ports_at = 8, 9
        expressions += [Constant(8, ports[0]), Constant(9, ports[1])]
    return [*expressions, Translate(kind, addresses, ports_at)]


# --- matches -------------------------------------------------------------------------------------


def _word(number: int) -> bytes:
    return number.to_bytes(_WORD, sys.byteorder)


def _comment(_info: bytes, _family: int) -> Expressions:
    return []


def _mark(info: bytes, _family: int) -> Expressions:
    mark, mask, invert = struct.unpack_from("=IIB", info)
    return masked(Field.MARK, 0, _word(mask), _word(mark), bool(invert))


def _ports(source: bool, low: int, high: int, invert: bool) -> Expressions:
    if (low, high) == (0, PORT_MASK) and not invert:
        return []
    return compared(Field.TRANSPORT, 2, ((low, high),), invert, 0 if source else 2)


def _tcp(info: bytes, _family: int) -> Expressions:
    s_low, s_high, d_low, d_high, option, flags, _wanted, invert = struct.unpack_from("=4H4B", info)
    more: Expressions = [Unclear("tcp option")] if option or flags else []
    return [
        *_ports(True, s_low, s_high, bool(invert & 1)),
        *_ports(False, d_low, d_high, bool(invert & 2)),
        *more,
    ]


def _udp(info: bytes, _family: int) -> Expressions:
    s_low, s_high, d_low, d_high, invert = struct.unpack_from("=4HB", info)
    return [
        *_ports(True, s_low, s_high, bool(invert & 1)),
        *_ports(False, d_low, d_high, bool(invert & 2)),
    ]


def _multiport(info: bytes, _family: int) -> Expressions:
    which, count = info[0], info[1]
    ports = struct.unpack_from("=15H", info, 2)
    opens = info[32:47]
    invert = bool(info[47])
    if which not in (0, 1) or count > len(ports):
        return [Unclear("match multiport")]
    ranges: list[tuple[int, int]] = []
    at = 0
    while at < count:
        high = ports[at + 1] if opens[at] and at + 1 < count else ports[at]
        ranges.append((ports[at], high))
        at += 2 if opens[at] else 1
    return compared(Field.TRANSPORT, 2, ranges, invert, 0 if which == 0 else 2)


def _addrtype(info: bytes, _family: int) -> Expressions:
    source, dest, flags = struct.unpack_from("=HHI", info)
    if flags & ~3:
        return [Unclear("match addrtype")]  # limited to one interface
    return [
        *_type(Field.SADDR_TYPE, source, bool(flags & 1)),
        *_type(Field.DADDR_TYPE, dest, bool(flags & 2)),
    ]


def _type(source: Field, types: int, invert: bool) -> Expressions:
    if not types:
        return []
    ranges = []
    for kind in AddressType:
        if types >> kind & 1:
            number = int.from_bytes(_word(kind), "big")
            ranges.append((number, number))
    return compared(source, _WORD, ranges, invert)


_ALIAS = 1 << 13  # XT_CONNTRACK_STATE_ALIAS: written as -m state
_NEW, _SNAT, _DNAT = 1 << 3, 1 << 6, 1 << 7  # of XT_CONNTRACK_STATE_*


def _state(info: bytes, _family: int) -> Expressions:
    (states,) = struct.unpack_from("=I", info)
    return [] if states & _NEW else [Within(0, 0, ())]


def _conntrack(info: bytes, _family: int) -> Expressions:
    flags, inverted, states = struct.unpack_from("=HHH", info, 146)
    if flags & ~_ALIAS != 1 or states & (_SNAT | _DNAT):
        return [Unclear("match conntrack")]
    return [] if bool(states & _NEW) != bool(inverted & 1) else [Within(0, 0, ())]


_POLICY_ELEMENT = 76  # bytes of struct xt_policy_elem


def _policy(info: bytes, _family: int) -> Expressions:
    flags, length = struct.unpack_from("=HH", info, 4 * _POLICY_ELEMENT)
    wants_none, is_out = bool(flags & 4), bool(flags & 2)
    if not is_out:
        return [Unclear("match policy --dir in")]
    if wants_none:
        return compared(Field.IPSEC, 1, ((0, 0),))
    has_ipsec = compared(Field.IPSEC, 1, ((1, 1),))
    # Each ends with what it compares: struct xt_policy_spec, twice.
    details = any(info[_POLICY_ELEMENT - 2 : _POLICY_ELEMENT])
    return [*has_ipsec, *([Unclear("match policy")] if details or length != 1 else [])]


def _iprange(info: bytes, family: int) -> Expressions:
    *addresses, flags = struct.unpack_from("=16s16s16s16sB", info)
    width, begins = (4, 12) if family == IPV4 else (16, 8)
    low_src, high_src, low_dst, high_dst = (
        int.from_bytes(address[:width], "big") for address in addresses
    )
    found: Expressions = []
    if flags & 1:
        found += compared(Field.NETWORK, width, ((low_src, high_src),), bool(flags & 16), begins)
    if flags & 2:
        found += compared(
            Field.NETWORK, width, ((low_dst, high_dst),), bool(flags & 32), begins + width
        )
    return found


def _devgroup(info: bytes, _family: int) -> Expressions:
    flags, src, src_mask, dst, dst_mask = struct.unpack_from("=5I", info)
    found: Expressions = []
    if flags & 1:
        found += masked(Field.IIF_GROUP, 0, _word(src_mask), _word(src), bool(flags & 2))
    if flags & 4:
        found += masked(Field.OIF_GROUP, 0, _word(dst_mask), _word(dst), bool(flags & 8))
    return found


_MATCHES: dict[tuple[str, int], Callable[[bytes, int], Expressions]] = {
    ("comment", 0): _comment,
    ("mark", 1): _mark,
    ("tcp", 0): _tcp,
    ("udp", 0): _udp,
    ("multiport", 1): _multiport,
    ("addrtype", 1): _addrtype,
    ("state", 0): _state,
    ("conntrack", 2): _conntrack,
    ("conntrack", 3): _conntrack,
    ("policy", 0): _policy,
    ("iprange", 1): _iprange,
    ("devgroup", 0): _devgroup,
}
