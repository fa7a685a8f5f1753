"""NETLINK_XFRM's structures and attributes, decoded into SPD entries and SAs.

Rules of this module: sizes and offsets are those of linux/xfrm.h, whose structures "may not change
size"; x86-64 and aarch64 lay them out alike. Priorities, reqids and marks are in host order, SPIs
and ports in network order; an IPv4 address is the first 4 bytes of an xfrm_address_t's 16.

    structure (bytes)           fields decoded, as offset:field
    xfrm_selector (56)          0:daddr 16:saddr 32:dport 34:dport_mask 36:sport 38:sport_mask
                                40:family 42:prefixlen_d 43:prefixlen_s 44:proto 48:ifindex
    xfrm_usersa_info (224)      0:sel 56:id.daddr 72:id.spi 76:id.proto 80:saddr
                                136:lft.hard_add_expires_seconds 168:curlft.packets
                                176:curlft.add_time
                                208:reqid 212:family 214:mode
    xfrm_usersa_id (24)         0:daddr 16:spi 20:family 22:proto
    xfrm_userpolicy_info (168)  0:sel 152:priority 156:index 160:dir 161:action
    xfrm_userpolicy_id (64)     none: DELPOLICY has the policy in XFRMA_POLICY
    xfrm_user_tmpl (64)         0:id.daddr 16:id.spi 20:id.proto 24:family 28:saddr 44:reqid
                                48:mode 50:optional
    xfrm_user_expire (232)      0:state (xfrm_usersa_info) 224:hard
    xfrm_user_polexpire (176)   0:pol (xfrm_userpolicy_info) 168:hard

Source: linux/xfrm.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from socket import AF_INET, AF_INET6

from ipsecgate.core.codec.netlink import Message, Span
from ipsecgate.core.model.flow import Address, Network, Selector
from ipsecgate.core.model.ipsec import (
    NO_MARK,
    Action,
    Direction,
    Mark,
    Mode,
    Sa,
    SaId,
    SpdEntry,
    SpdKey,
    Template,
)

XFRMA_TMPL, XFRMA_SA, XFRMA_POLICY, XFRMA_POLICY_TYPE, XFRMA_MARK, XFRMA_IF_ID = 5, 6, 7, 16, 21, 31
XFRMA_SA_PCPU = 35
XFRMA_ALGORITHMS = frozenset({1, 2, 3, 18, 20})  # AUTH, CRYPT, COMP, AEAD, AUTH_TRUNC

SELECTOR_SIZE, SA_SIZE, SA_ID_SIZE, POLICY_SIZE, POLICY_ID_SIZE = 56, 224, 24, 168, 64
TEMPLATE_SIZE, EXPIRE_SIZE, POLEXPIRE_SIZE = 64, 232, 176

POLICY_BLOCK = 1
LIFETIME_UNLIMITED = (0, 2**64 - 1)  # unset, XFRM_INF

_SELECTOR = struct.Struct("=16s16s8sHBBB3xi4x")
_PORTS = struct.Struct("!HHHH")
_SA = struct.Struct("=56s16s4sB3x16s40xQ32xQ24xIHB9x")
_SA_PACKETS = struct.Struct("=56x16s4sB91xQ36xH10x")
_SA_ID = struct.Struct("=16s4sHBx")
_POLICY = struct.Struct("=56s96xIIBB6x")
_TEMPLATE = struct.Struct("=16s4sB3xH2x16sIBxB13x")
_MARK = struct.Struct("=II")
_U32 = struct.Struct("=I")

_DIRECTIONS = {int(direction): direction for direction in Direction}
_MODES = {int(mode): mode for mode in Mode if mode is not Mode.UNKNOWN}
_NO_HOST_BITS = (0, 0)

Attributes = Mapping[int, Span]


def policy(message: Message, at: int, attributes: Attributes) -> SpdEntry | None:
    """Decode an xfrm_userpolicy_info and its attributes; None if it is skipped."""
    sel, priority, index, number, action = _POLICY.unpack_from(message.data, at)
    direction = _DIRECTIONS.get(number)
    if direction is None or not is_main(message, attributes):
        return None
    selector = _selector(message, sel, at)
    if selector is None:
        raise message.bad("sel.family", at + 40)
    templates = tuple(_templates(message, attributes))
    if action == POLICY_BLOCK:
        meaning = Action.DISCARD
    else:
        meaning = Action.PROTECT if templates else Action.BYPASS
    key = SpdKey(
        selector,
        _mark(message, attributes),
        _if_id(message, attributes),
        _host_bits(sel, selector),
        direction,
    )
    return SpdEntry(key, priority, meaning, templates, index)


def _templates(message: Message, attributes: Attributes) -> Iterator[Template]:
    start, end = attributes.get(XFRMA_TMPL, (0, 0))
    if (end - start) % TEMPLATE_SIZE:
        raise message.bad("XFRMA_TMPL", start)
    for at in range(start, end, TEMPLATE_SIZE):
        daddr, spi, proto, family, saddr, reqid, mode, optional = _TEMPLATE.unpack_from(
            message.data, at
        )
        yield Template(
            proto=proto,
            mode=_mode(mode),
            reqid=reqid,
            spi=int.from_bytes(spi, "big"),
            saddr=_address(message, family, saddr, at + 24) if any(saddr) else None,
            daddr=_address(message, family, daddr, at + 24) if any(daddr) else None,
            optional=bool(optional),
        )


def sa(message: Message, at: int, attributes: Attributes) -> Sa:
    """Decode an xfrm_usersa_info and its attributes."""
    sel, daddr, spi, proto, saddr, lifetime, added, reqid, family, mode = _SA.unpack_from(
        message.data, at
    )
    destination = _address(message, family, daddr, at + 212)
    identity = SaId(destination, int.from_bytes(spi, "big"), proto)
    return Sa(
        id=identity,
        saddr=_address(message, family, saddr, at + 212),
        reqid=reqid,
        mode=_mode(mode),
        selector=_selector(message, sel, at),
        mark=_mark(message, attributes),
        if_id=_if_id(message, attributes),
        cpu=_cpu(message, attributes),
        larval=identity.spi == 0 or XFRMA_ALGORITHMS.isdisjoint(attributes),
        hard_lifetime=None if lifetime in LIFETIME_UNLIMITED else lifetime,
        installed_at=added,
    )


def sa_packets(message: Message, at: int) -> tuple[SaId, int]:
    """Decode which state an xfrm_usersa_info is of, and how many packets it has carried."""
    daddr, spi, proto, packets, family = _SA_PACKETS.unpack_from(message.data, at)
    destination = _address(message, family, daddr, at + 212)
    return SaId(destination, int.from_bytes(spi, "big"), proto), packets


def sa_id(message: Message, at: int) -> SaId:
    """Decode an xfrm_usersa_id."""
    daddr, spi, family, proto = _SA_ID.unpack_from(message.data, at)
    return SaId(_address(message, family, daddr, at + 20), int.from_bytes(spi, "big"), proto)


def _selector(message: Message, raw: bytes, at: int) -> Selector | None:
    """Decode an xfrm_selector; None if it has no family, and so matches flows of both."""
    daddr, saddr, ports, family, bits_d, bits_s, proto, ifindex = _SELECTOR.unpack(raw)
    if family == 0:
        return None
    dport, dport_mask, sport, sport_mask = _PORTS.unpack(ports)
    try:
        src, dst = _network(family, saddr, bits_s), _network(family, daddr, bits_d)
    except ValueError as error:
        raise message.bad(f"sel ({error})", at) from None
    return Selector(src, dst, proto, sport, sport_mask, dport, dport_mask, ifindex)


def _host_bits(raw: bytes, selector: Selector) -> tuple[int, int]:
    """Return the bits of a selector's source and destination beyond their prefixes."""
    width = selector.src.max_prefixlen
    if raw[42] == width and raw[43] == width:
        return _NO_HOST_BITS  # two hosts
    size = width // 8
    source, destination = raw[16 : 16 + size], raw[:size]
    return (
        int.from_bytes(source, "big") & (1 << width - raw[43]) - 1,
        int.from_bytes(destination, "big") & (1 << width - raw[42]) - 1,
    )


# A few addresses and networks occur again and again, and creating them is most of the cost.
@lru_cache(maxsize=4096)
def _network(family: int, raw: bytes, bits: int) -> Network:
    if family == AF_INET:
        return IPv4Network((int.from_bytes(raw[:4], "big"), bits), strict=False)
    if family == AF_INET6:
        return IPv6Network((int.from_bytes(raw, "big"), bits), strict=False)
    raise ValueError(f"family {family}")


@lru_cache(maxsize=4096)
def _ip(family: int, raw: bytes) -> Address:
    if family == AF_INET:
        return IPv4Address(raw[:4])
    if family == AF_INET6:
        return IPv6Address(raw)
    raise ValueError(f"family {family}")


def _address(message: Message, family: int, raw: bytes, family_at: int) -> Address:
    try:
        return _ip(family, raw)
    except ValueError as error:
        raise message.bad(str(error), family_at) from None


def _mode(number: int) -> Mode:
    return _MODES.get(number, Mode.UNKNOWN)


def _mark(message: Message, attributes: Attributes) -> Mark:
    at = message.payload(attributes, XFRMA_MARK, _MARK.size, "XFRMA_MARK")
    return NO_MARK if at is None else Mark(*_MARK.unpack_from(message.data, at))


def _if_id(message: Message, attributes: Attributes) -> int:
    at = message.payload(attributes, XFRMA_IF_ID, _U32.size, "XFRMA_IF_ID")
    return 0 if at is None else int(_U32.unpack_from(message.data, at)[0])


def _cpu(message: Message, attributes: Attributes) -> int | None:
    at = message.payload(attributes, XFRMA_SA_PCPU, _U32.size, "XFRMA_SA_PCPU")
    return None if at is None else int(_U32.unpack_from(message.data, at)[0])


def is_main(message: Message, attributes: Attributes) -> bool:
    """Return whether a policy is a main one; a kernel without sub policies omits the attribute."""
    at = message.payload(attributes, XFRMA_POLICY_TYPE, 1, "XFRMA_POLICY_TYPE")
    return at is None or message.data[at] == 0
