"""Classify a frame on the path: IKE, ESP, link housekeeping, or cleartext.

Pure: bytes in, a `Packet` out. Anything not known to be harmless is CLEAR, including a fragment
of an unknown datagram: a mistake here must look like a leak, never hide one.
"""

from __future__ import annotations

import struct
from collections.abc import Container
from dataclasses import dataclass
from enum import Enum
from ipaddress import ip_address

from ipsecgate.core.model.flow import TCP, UDP, Address
from ipsecgate.core.model.ipsec import AH, ESP

ETHERNET = 14
ETH_ARP = 0x0806
ETH_IPV4 = 0x0800
ETH_IPV6 = 0x86DD
ICMP, ICMPV6 = 1, 58
UNREACHABLE = {ICMP: b"\x03", ICMPV6: b"\x01"}  # RFC 792, RFC 4443
HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION = 0, 43, 44, 60
# RFC 2710 and RFC 3810 (listener discovery), RFC 4861 (neighbour discovery).
HOUSEKEEPING = {130, 131, 132, 133, 134, 135, 136, 137, 143}
IKE_PORT, NATT_PORT = 500, 4500
SYN, ACK = 0x02, 0x10


class Kind(Enum):
    """The kind of a frame, as a watch for leaks sees it."""

    IKE = "ike"
    ESP = "esp"
    LINK = "link"  # ARP, neighbour discovery, multicast listeners
    CLEAR = "clear"


@dataclass(frozen=True, slots=True)
class Packet:
    """One frame, captured once, where it entered the path.

    `sender` is the host that sent it (a, b). `wall_ns` is the kernel's timestamp (CLOCK_REALTIME,
    nanoseconds); `time` is the same moment on CLOCK_MONOTONIC, in seconds. `flags` are TCP's.
    `is_unreachable`: an ICMP "unreachable" about a datagram that its sender received, which only a
    kernel sends. Ports are 0 in protocols without ports and in fragments after the first.
    """

    sender: str
    time: float
    wall_ns: int
    kind: Kind
    saddr: Address | None = None
    daddr: Address | None = None
    proto: int = 0
    sport: int = 0
    dport: int = 0
    flags: int = 0
    is_unreachable: bool = False

    @property
    def is_syn(self) -> bool:
        """Return whether this opens a TCP connection: SYN without ACK."""
        return self.proto == TCP and self.flags & (SYN | ACK) == SYN

    def __str__(self) -> str:
        flow = f"{self.saddr}:{self.sport} > {self.daddr}:{self.dport}"
        return f"{self.time:.6f} {self.sender} {self.kind.value} {flow} proto {self.proto}"


@dataclass(frozen=True, slots=True)
class Transport:
    """What IP carries: protocol and bytes. `first`: not a later fragment, so it has ports."""

    proto: int
    body: bytes
    first: bool = True


def ipv4(data: bytes) -> Transport:
    """Skip an IPv4 header. Source: RFC 791 section 3.1."""
    offset = struct.unpack_from("!H", data, 6)[0] & 0x1FFF
    return Transport(data[9], data[(data[0] & 0xF) * 4 :], offset == 0)


def ipv6(data: bytes) -> Transport:
    """Skip an IPv6 header and its extension headers. Source: RFC 8200 section 4."""
    proto, at = data[6], 40
    while proto in (HOP_BY_HOP, ROUTING, DESTINATION, FRAGMENT):
        if proto == FRAGMENT:
            if struct.unpack_from("!H", data, at + 2)[0] & 0xFFF8:
                return Transport(data[at], b"", first=False)
            proto, at = data[at], at + 8
        else:
            proto, at = data[at], at + (data[at + 1] + 1) * 8
    return Transport(proto, data[at:])


def kind_of(
    upper: Transport, sport: int, dport: int, natt_ports: Container[int] = (NATT_PORT,)
) -> Kind:
    """Classify what IP carries. `natt_ports`: where ESP in UDP and IKE with a marker may be."""
    if upper.proto in (ESP, AH):
        return Kind.ESP
    if upper.proto == ICMPV6 and upper.body[:1] and upper.body[0] in HOUSEKEEPING:
        return Kind.LINK
    if upper.body[:1] == UNREACHABLE.get(upper.proto):
        return kind_of_unreachable(upper, natt_ports)
    if upper.proto == UDP and IKE_PORT in (sport, dport):
        return Kind.IKE
    if upper.proto == UDP and (sport in natt_ports or dport in natt_ports):
        # RFC 3948: four zero bytes mark IKE, one byte of ones is a keepalive.
        marker = upper.body[8:12]
        return Kind.IKE if marker == bytes(4) or marker[:1] == b"\xff" == marker else Kind.ESP
    return Kind.CLEAR


def kind_of_unreachable(upper: Transport, natt_ports: Container[int]) -> Kind:
    """Classify an "unreachable" by what it quotes: kernels without an IKE daemon answer IKE so."""
    try:
        quoted = (ipv4 if upper.proto == ICMP else ipv6)(upper.body[8:])
        sport, dport = struct.unpack_from("!HH", quoted.body) if quoted.proto == UDP else (0, 0)
    except (IndexError, struct.error):
        return Kind.CLEAR
    return Kind.CLEAR if kind_of(quoted, sport, dport, natt_ports) is Kind.CLEAR else Kind.IKE


def is_unreachable(upper: Transport, saddr: bytes) -> bool:
    """Return whether this is an "unreachable" about a packet to its sender, made by a kernel."""
    if not upper.first or upper.body[:1] != UNREACHABLE.get(upper.proto):
        return False
    quoted = upper.body[8:]
    return saddr == (quoted[16:20] if upper.proto == ICMP else quoted[24:40])


def parse(
    frame: bytes,
    sender: str,
    time: float,
    wall_ns: int,
    natt_ports: Container[int] = (NATT_PORT,),
) -> Packet:
    """Parse an Ethernet frame. `frame` may be truncated; `natt_ports` as for `kind_of`."""
    (ethertype,) = struct.unpack_from("!H", frame, 12)
    data = frame[ETHERNET:]
    if ethertype == ETH_ARP:
        return Packet(sender, time, wall_ns, Kind.LINK)
    try:
        if ethertype == ETH_IPV4:
            upper, saddr, daddr = ipv4(data), data[12:16], data[16:20]
        elif ethertype == ETH_IPV6:
            upper, saddr, daddr = ipv6(data), data[8:24], data[24:40]
        else:
            return Packet(sender, time, wall_ns, Kind.CLEAR)
        sport = dport = flags = 0
        if upper.first and upper.proto in (TCP, UDP):
            sport, dport = struct.unpack_from("!HH", upper.body)
        if upper.first and upper.proto == TCP:
            flags = upper.body[13]
    except (IndexError, struct.error):
        return Packet(sender, time, wall_ns, Kind.CLEAR)
    return Packet(
        sender,
        time,
        wall_ns,
        kind_of(upper, sport, dport, natt_ports),
        ip_address(saddr),
        ip_address(daddr),
        upper.proto,
        sport,
        dport,
        flags,
        is_unreachable(upper, saddr),
    )
