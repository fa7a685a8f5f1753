"""Codec for RTM_GETROUTE about packets: those that a namespace sends, and those that it forwards.

Rules of this module: bytes in, values out; it opens no socket. The kernel answers for a packet that
arrives at a device as it would route it, filters by reverse path included.

Source: linux/rtnetlink.h (struct rtmsg), inet_rtm_getroute() in net/ipv4/route.c.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address
from socket import AF_INET, AF_INET6

from ipsecgate.core.codec.netlink import Message, Span, encode_request, messages
from ipsecgate.core.model.flow import Address
from ipsecgate.core.model.namespace import Route

NEWROUTE, GETROUTE = 24, 26
RTA_DST, RTA_SRC, RTA_IIF, RTA_OIF, RTA_GATEWAY, RTA_PREFSRC, RTA_VIA = 1, 2, 3, 4, 5, 7, 18
RTN_UNICAST, RTN_LOCAL = 1, 2

_HEADER = struct.Struct("=BBBBBBBBI")  # family, bits of destination and source, .. type, flags
_INDEX = struct.Struct("=I")
_SIZES: dict[int, int] = {AF_INET: 4, AF_INET6: 16}


def encode_packet_get(
    destination: Address,
    sequence: int,
    *,
    source: Address | None = None,
    arrives: int = 0,
    leaves: int = 0,
) -> bytes:
    """Encode RTM_GETROUTE for a packet.

    `arrives`: at the link of that index; 0: it is sent from here. `leaves`: by the link of that
    index, which its sender chose; 0: by any.
    """
    family = AF_INET if destination.version == 4 else AF_INET6
    bits = destination.max_prefixlen
    body = _HEADER.pack(family, bits, bits if source is not None else 0, 0, 0, 0, 0, 0, 0)
    body += _attribute(RTA_DST, destination.packed)
    if source is not None:
        body += _attribute(RTA_SRC, source.packed)
    for kind, link in ((RTA_IIF, arrives), (RTA_OIF, leaves)):
        if link:
            body += _attribute(kind, _INDEX.pack(link))
    return encode_request(GETROUTE, body, sequence)


def decode_packet(datagram: bytes) -> Iterator[Route]:
    """Yield the route in a reply to `encode_packet_get`, unless it is a dead end.

    Raises: DecodeError.
    """
    for message in messages(datagram):
        if message.type != NEWROUTE:
            continue
        at = message.structure(_HEADER.size, "rtmsg")
        family, kind = message.data[at], message.data[at + 7]
        if family not in _SIZES or kind not in (RTN_UNICAST, RTN_LOCAL):
            continue
        attributes = message.attributes(_HEADER.size)
        link = message.payload(attributes, RTA_OIF, _INDEX.size, "output device")
        yield Route(
            link=0 if link is None else _INDEX.unpack_from(message.data, link)[0],
            source=_address(message, attributes, RTA_PREFSRC, family),
            gateway=_address(message, attributes, RTA_GATEWAY, family) or _via(message, attributes),
            is_local=kind == RTN_LOCAL,
        )


def _attribute(kind: int, payload: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(payload), kind) + payload


def _address(
    message: Message, attributes: Mapping[int, Span], kind: int, family: int
) -> Address | None:
    at = message.payload(attributes, kind, _SIZES[family], f"attribute {kind}")
    return None if at is None else _unpack(family, message.data[at : at + _SIZES[family]])


def _via(message: Message, attributes: Mapping[int, Span]) -> Address | None:
    """Return the gateway of the other family, of an IPv4 route (struct rtvia)."""
    if RTA_VIA not in attributes:
        return None
    start, end = attributes[RTA_VIA]
    if end - start < 2 + _SIZES[AF_INET6]:
        raise message.bad("gateway of another family", start)
    return IPv6Address(message.data[start + 2 : start + 18])


def _unpack(family: int, raw: bytes) -> Address:
    return IPv4Address(raw) if family == AF_INET else IPv6Address(raw)
