"""Decoder of a table of iptables-legacy, as IPT_SO_GET_ENTRIES returns it.

Rules of this module: bytes in, values out. The table is a blob of entries, each with the offset of
the next; a chain is named by the offset of its first rule, because jumps name that.

Source: linux/netfilter_ipv4/ip_tables.h (struct ipt_entry), netfilter_ipv6/ip6_tables.h,
netfilter/x_tables.h; net/ipv4/netfilter/ip_tables.c: ipt_do_table().
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import count

from ipsecgate.core.codec.xtables import (
    IPV4,
    IPV6,
    Expressions,
    compared,
    decode_match,
    decode_target,
    masked,
)
from ipsecgate.core.model.nat import (
    BaseChain,
    ChainName,
    Code,
    Field,
    Hook,
    Rule,
    Ruleset,
    Unclear,
    Verdict,
)
from ipsecgate.core.model.value import value
from ipsecgate.errors import GateError

TABLES = ("raw", "mangle", "nat")
INFO = struct.Struct("=32sI5I5III")  # struct ipt_getinfo
_PRIORITIES = {
    "raw": (-300, -300, -300, -300, -300),
    "mangle": (-150, -150, -150, -150, -150),
    "nat": (-100, 100, 0, -100, 100),  # by hook; source: NF_IP_PRI_NAT_DST, NF_IP_PRI_NAT_SRC
}
_MATCH = struct.Struct("=H29sB")  # struct xt_entry_match, and xt_entry_target
_FRAGMENT = 1
_INV_IN, _INV_OUT, _INV_SRC, _INV_DST, _INV_PROTO = 1, 2, 8, 16, 0x40


class TableError(GateError):
    """A table of iptables-legacy that does not match the kernel's headers."""

    def __init__(self, what: str) -> None:
        super().__init__(f"iptables-legacy: {what}", hint="report a bug, with `uname -r`")


@value
class TableInfo:
    """Where a table's built-in chains begin, by hook, and its size."""

    starts: dict[Hook, int]
    size: int


@value
class _Format:
    """The layout of an entry of one family."""

    family: int
    width: int  # of an address
    offsets: int  # where target_offset and next_offset are
    size: int
    proto: int  # where the protocol is
    invert: int  # where the flags of inversion are, behind the other flags
    goto: int  # the flag of a goto


_FORMATS = {
    4: _Format(IPV4, 4, 88, 112, 80, 83, 2),
    6: _Format(IPV6, 16, 140, 168, 128, 132, 4),
}


def decode_info(raw: bytes) -> TableInfo:
    """Decode IPT_SO_GET_INFO's answer. Raises: TableError."""
    if len(raw) < INFO.size:
        raise TableError("short answer about a table")
    _, hooks, *numbers = INFO.unpack_from(raw)
    starts = {hook: numbers[hook] for hook in Hook if hooks >> hook & 1}
    return TableInfo(starts, numbers[11])


def decode_table(name: str, version: int, info: TableInfo, blob: bytes) -> Ruleset:
    """Decode the entries of a table of IPv4 or IPv6. Raises: TableError."""
    layout = _FORMATS[version]
    table = layout.family, f"{name} (iptables-legacy)"
    chains: dict[ChainName, tuple[Rule, ...]] = {}
    own: list[Rule] = []
    own_start, own_name, numbers = 0, "", count(1)
    names = {at: hook.name for hook, at in info.starts.items()}
    for at, following in _entries(blob, layout):
        target, _, _ = _target(blob, at, layout)
        if at in names or target == "ERROR":
            _keep(chains, table, own_start, own)
            is_head = target == "ERROR"
            own, own_start = [], following if is_head else at
            own_name = _error_name(blob, at, layout) if is_head else names[at]
            numbers = count(1)
            if is_head:
                continue
        label = f"rule {next(numbers)} of chain {own_name} in table {table[1]}"
        own.append(Rule(tuple(_expressions(blob, at, following, layout)), label))
    _keep(chains, table, own_start, own)
    bases = tuple(
        BaseChain(table, str(at), hook, _PRIORITIES[name][hook], name == "nat")
        for hook, at in info.starts.items()
    )
    return Ruleset(bases, chains)


def _keep(
    chains: dict[ChainName, tuple[Rule, ...]], table: tuple[int, str], start: int, own: list[Rule]
) -> None:
    if own:
        chains[table, str(start)] = tuple(own)


def _entries(blob: bytes, layout: _Format) -> Iterator[tuple[int, int]]:
    """Yield where each entry begins and ends. Raises: TableError."""
    at = 0
    while at < len(blob):
        if at + layout.size > len(blob):
            raise TableError(f"truncated entry at byte {at}")
        target, following = struct.unpack_from("=HH", blob, at + layout.offsets)
        if (
            not layout.size <= target <= following - _MATCH.size
            or at + following > len(blob)
            or following % 8
        ):
            raise TableError(f"bad offsets at byte {at}")
        yield at, at + following
        at += following


def _target(blob: bytes, at: int, layout: _Format) -> tuple[str, int, bytes]:
    """Return the name, the revision and the data of an entry's target. Raises: TableError."""
    offset, following = struct.unpack_from("=HH", blob, at + layout.offsets)
    return _extension(blob, at + offset, at + following)


def _extension(blob: bytes, at: int, end: int) -> tuple[str, int, bytes]:
    if at + _MATCH.size > end:
        raise TableError(f"truncated extension at byte {at}")
    size, name, revision = _MATCH.unpack_from(blob, at)
    if not _MATCH.size <= size <= end - at:
        raise TableError(f"bad size at byte {at}")
    text = name.split(b"\0")[0].decode(errors="replace")
    return text, revision, blob[at + _MATCH.size : at + size]


def _error_name(blob: bytes, at: int, layout: _Format) -> str:
    return _target(blob, at, layout)[2].split(b"\0")[0].decode(errors="replace")


def _expressions(blob: bytes, at: int, end: int, layout: _Format) -> Expressions:
    found = _header(blob, at, layout)
    offset, _ = struct.unpack_from("=HH", blob, at + layout.offsets)
    place = at + layout.size
    while place < at + offset:
        name, revision, info = _extension(blob, place, at + offset)
        found += decode_match(name, revision, info, layout.family)
        place += _MATCH.size + len(info)
    name, revision, info = _target(blob, at, layout)
    if name:
        return [*found, *decode_target(name, revision, info, layout.family)]
    if len(info) < 4:
        raise TableError(f"truncated verdict at byte {at}")
    (code,) = struct.unpack_from("=i", info)
    if code >= 0:
        is_goto = blob[at + layout.invert - 1] & layout.goto
        if code == end and not is_goto:
            return found  # a rule without a target continues at the next one
        verdict = Verdict(Code.GOTO if is_goto else Code.JUMP, str(code))
    else:
        codes = {-1: Code.DROP, -2: Code.ACCEPT, -5: Code.RETURN}
        verdict = Verdict(codes.get(code, Code.QUEUE))
    return [*found, verdict]


def _header(blob: bytes, at: int, layout: _Format) -> Expressions:
    """Return the part of an entry that every rule has: addresses, devices, protocol."""
    width = layout.width
    src, dst, src_mask, dst_mask = (
        blob[at + part * width : at + (part + 1) * width] for part in range(4)
    )
    names = at + 4 * width
    iif, oif, iif_mask, oif_mask = (
        blob[names + part * 16 : names + (part + 1) * 16] for part in range(4)
    )
    (proto,) = struct.unpack_from("=H", blob, at + layout.proto)
    flags, invert = blob[at + layout.invert - 1], blob[at + layout.invert]
    begins = 12 if layout.family == IPV4 else 8
    found: Expressions = []
    for raw, mask, where, bit in (
        (src, src_mask, begins, _INV_SRC),
        (dst, dst_mask, begins + width, _INV_DST),
    ):
        if any(mask) or invert & bit:
            found += masked(Field.NETWORK, where, mask, raw, bool(invert & bit))
    for raw, mask, field, bit in (
        (iif, iif_mask, Field.IIF_NAME, _INV_IN),
        (oif, oif_mask, Field.OIF_NAME, _INV_OUT),
    ):
        if any(mask) or invert & bit:
            # Of "eth+" the mask leaves the "+" out.
            name = bytes(a & b for a, b in zip(raw, mask, strict=True))
            found += masked(field, 0, mask, name, bool(invert & bit))
    if proto:
        found += compared(Field.PROTO, 1, ((proto, proto),), bool(invert & _INV_PROTO))
    if flags & _FRAGMENT and layout.family == IPV4:
        found.append(Unclear("fragment"))
    return found
