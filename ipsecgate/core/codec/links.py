"""Codec for what NETLINK_ROUTE says about links, their addresses, and network namespaces.

Rules of this module: bytes in, values out; it opens no socket. An id of a namespace (nsid) is a
number that one namespace has for another, so it means something only where it was read.

Source: linux/if_link.h, linux/if_addr.h, linux/if_addrlabel.h, linux/net_namespace.h,
linux/rtnetlink.h (struct ifinfomsg, tcmsg).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_network
from socket import AF_INET, AF_INET6

from ipsecgate.core.codec.netlink import Message, Span, encode_dump, encode_request, messages
from ipsecgate.core.model.flow import Address
from ipsecgate.core.model.namespace import DeviceAddress, Link
from ipsecgate.core.model.prefixes import WIDTH, Prefix, as_prefix

NEWLINK, GETLINK = 16, 18
NEWADDR, GETADDR = 20, 22
NEWQDISC, GETQDISC = 36, 38
NEWADDRLABEL, GETADDRLABEL = 72, 74
NEWNSID, GETNSID = 88, 90
IFF_UP, IFF_LOOPBACK = 0x1, 0x8
IFLA_IFNAME, IFLA_LINK, IFLA_MASTER, IFLA_LINKINFO = 3, 5, 10, 18
IFLA_LINK_NETNSID, IFLA_XDP = 37, 43
IFLA_INFO_KIND, IFLA_XDP_ATTACHED = 1, 2
NETNSA_NSID, NETNSA_FD = 1, 3
TCA_KIND = 1
IFAL_ADDRESS = 1
IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
IFA_F_SECONDARY, IFA_F_DADFAILED, IFA_F_DEPRECATED, IFA_F_TENTATIVE = 0x01, 0x08, 0x20, 0x40
UNUSABLE = IFA_F_DADFAILED | IFA_F_DEPRECATED | IFA_F_TENTATIVE
RT_SCOPE_UNIVERSE = 0
INGRESS = frozenset({"ingress", "clsact"})

_LINK = struct.Struct("=BxHiII")  # family, device type, index, flags, changed flags
_TC = struct.Struct("=BxHiIII")  # family, index, handle, parent, info
_ADDRESS = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_LABEL = struct.Struct("=BxBBII")  # family, prefix length, flags, index, sequence
_GENERIC = struct.Struct("=Bxxx")  # family
_NUMBER = struct.Struct("=i")


def encode_link_dump(sequence: int) -> bytes:
    """Encode RTM_GETLINK for all links."""
    return encode_dump(GETLINK, _LINK.pack(0, 0, 0, 0, 0), sequence)


def encode_address_dump(sequence: int) -> bytes:
    """Encode RTM_GETADDR for the addresses of all links and families."""
    return encode_dump(GETADDR, _ADDRESS.pack(0, 0, 0, 0, 0), sequence)


def encode_label_dump(sequence: int) -> bytes:
    """Encode RTM_GETADDRLABEL for the labels of IPv6 addresses (`ip addrlabel`)."""
    return encode_dump(GETADDRLABEL, _LABEL.pack(AF_INET6, 0, 0, 0, 0), sequence)


def encode_qdisc_dump(sequence: int) -> bytes:
    """Encode RTM_GETQDISC for the queueing disciplines of all links."""
    return encode_dump(GETQDISC, _TC.pack(0, 0, 0, 0, 0, 0), sequence)


def encode_nsid_get(descriptor: int, sequence: int) -> bytes:
    """Encode RTM_GETNSID: which id has this namespace for the one behind a file descriptor?"""
    attribute = struct.pack("=HHi", 4 + _NUMBER.size, NETNSA_FD, descriptor)
    return encode_request(GETNSID, _GENERIC.pack(0) + attribute, sequence)


def decode_links(datagram: bytes) -> Iterator[Link]:
    """Yield the links in a datagram of a dump. Raises: DecodeError."""
    for message in messages(datagram):
        if message.type != NEWLINK:
            continue
        at = message.structure(_LINK.size, "ifinfomsg")
        _family, _type, index, flags, _changed = _LINK.unpack_from(message.data, at)
        attributes = message.attributes(_LINK.size)
        yield Link(
            index,
            message.text(attributes, IFLA_IFNAME),
            message.text(message.nested(attributes, IFLA_LINKINFO), IFLA_INFO_KIND),
            peer=_number(message, attributes, IFLA_LINK) or 0,
            peer_netns=_number(message, attributes, IFLA_LINK_NETNSID),
            master=_number(message, attributes, IFLA_MASTER) or 0,
            is_loopback=bool(flags & IFF_LOOPBACK),
            is_up=bool(flags & IFF_UP),
            has_program=_has_xdp(message, attributes),
        )


def decode_addresses(datagram: bytes) -> Iterator[DeviceAddress]:
    """Yield the addresses in a datagram of a dump, in the kernel's order. Raises: DecodeError."""
    for message in messages(datagram):
        if message.type != NEWADDR:
            continue
        at = message.structure(_ADDRESS.size, "ifaddrmsg")
        family, bits, flags, scope, index = _ADDRESS.unpack_from(message.data, at)
        if family not in (AF_INET, AF_INET6):
            continue
        attributes = message.attributes(_ADDRESS.size)
        # Of a point-to-point link, IFA_ADDRESS is the other end. IPv6 has IFA_LOCAL only then.
        place = _address(message, attributes, IFA_ADDRESS, family)
        own = _address(message, attributes, IFA_LOCAL, family) or place
        if own is None or bits > own.max_prefixlen:
            raise message.bad("address", at)
        flags = _number(message, attributes, IFA_FLAGS) or flags
        yield DeviceAddress(
            index,
            own,
            ip_network((place or own, bits), strict=False),
            is_global=scope == RT_SCOPE_UNIVERSE,
            is_secondary=family == AF_INET and bool(flags & IFA_F_SECONDARY),
            is_usable=family == AF_INET or not flags & UNUSABLE,
        )


def decode_labels(datagram: bytes) -> Iterator[Prefix]:
    """Yield the prefixes that have a label in a datagram of a dump. Raises: DecodeError."""
    for message in messages(datagram):
        if message.type != NEWADDRLABEL:
            continue
        at = message.structure(_LABEL.size, "ifaddrlblmsg")
        family, bits, *_ = _LABEL.unpack_from(message.data, at)
        address = _address(message, message.attributes(_LABEL.size), IFAL_ADDRESS, AF_INET6)
        if family != AF_INET6 or address is None or bits > WIDTH[6]:
            raise message.bad("label", at)
        yield as_prefix(ip_network((address, bits), strict=False))


def decode_ingress(datagram: bytes) -> Iterator[int]:
    """Yield the index of each link with a queueing discipline for what arrives at it.

    A filter or a program there may send a packet elsewhere before the host's network stack sees it.
    Raises: DecodeError.
    """
    for message in messages(datagram):
        if message.type == NEWQDISC:
            at = message.structure(_TC.size, "tcmsg")
            _family, _pad, index, *_ = _TC.unpack_from(message.data, at)
            if message.text(message.attributes(_TC.size), TCA_KIND) in INGRESS:
                yield index


def decode_nsid(datagram: bytes) -> Iterator[int]:
    """Yield the id in a reply to `encode_nsid_get`; -1: it has none. Raises: DecodeError."""
    for message in messages(datagram):
        if message.type == NEWNSID:
            message.structure(_GENERIC.size, "rtgenmsg")
            number = _number(message, message.attributes(_GENERIC.size), NETNSA_NSID)
            if number is not None:
                yield number


def _has_xdp(message: Message, attributes: Mapping[int, Span]) -> bool:
    xdp = message.nested(attributes, IFLA_XDP)
    start, end = xdp.get(IFLA_XDP_ATTACHED, (0, 0))
    return any(message.data[start:end])


def _number(message: Message, attributes: Mapping[int, Span], kind: int) -> int | None:
    at = message.payload(attributes, kind, _NUMBER.size, f"attribute {kind}")
    return None if at is None else int(_NUMBER.unpack_from(message.data, at)[0])


def _address(
    message: Message, attributes: Mapping[int, Span], kind: int, family: int
) -> Address | None:
    size = 4 if family == AF_INET else 16
    at = message.payload(attributes, kind, size, f"attribute {kind}")
    if at is None:
        return None
    raw = message.data[at : at + size]
    return IPv4Address(raw) if family == AF_INET else IPv6Address(raw)
