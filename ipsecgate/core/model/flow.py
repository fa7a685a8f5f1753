"""What an application asks for (`Flow`) and what a policy names (`Selector`).

Rules of this module: ports and protocols are plain host-order integers, 0 means
"any" in a selector and "not chosen yet" in a flow; an IPv4-mapped IPv6 address
is its IPv4 address here, because the wire sees IPv4.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

TCP = 6
UDP = 17
PROTOCOLS = {"any": 0, "icmp": 1, "tcp": TCP, "udp": UDP, "ipv6-icmp": 58, "sctp": 132}
ICMP = (1, 58)
PROTOCOL_NAMES = {number: name for name, number in PROTOCOLS.items()}

PORT_MASK = 0xFFFF
OPAQUE = (PORT_MASK, 0)  # a traffic selector for packets without ports, RFC 7296 3.13.1
DHCP = (("255.255.255.255", 68, 67), ("ff02::1:2", 546, 547))
ANY_V4 = IPv4Network("0.0.0.0/0")
ANY_V6 = IPv6Network("::/0")


def unmap(address: Address) -> Address:
    """Return the IPv4 address inside ::ffff:a.b.c.d, any other address as it is.

    Source: RFC 4291 section 2.5.5.2.
    """
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def parse_address(text: str) -> Address:
    """Parse an address, v4-mapped ones to IPv4. Raises: ValueError."""
    return unmap(ip_address(text))


@dataclass(frozen=True, slots=True)
class Flow:
    """A request of an application: connect() or a datagram's sendto().

    `saddr` None and `sport` 0: the socket is not bound, the kernel will choose.
    `mark` is the socket's SO_MARK. Of ICMP `dport` is type and code, 8 bits each.
    Source: US 7,028,332 claim 1 (source and destination address, protocol, ports).
    """

    daddr: Address
    proto: int
    dport: int
    saddr: Address | None = None
    sport: int = 0
    mark: int = 0

    def __str__(self) -> str:
        host = f"[{self.daddr}]" if self.daddr.version == 6 else str(self.daddr)
        name = PROTOCOL_NAMES.get(self.proto, self.proto)
        if self.proto in ICMP:
            return f"{name} {self.daddr} type {self.dport >> 8}"
        return f"{name} {host}:{self.dport}" if self.dport else f"{name} {self.daddr}"


def is_exempt(flow: Flow) -> bool:
    """Tell whether a flow never leaves the link, as the hooks do: loopback, and DHCP.

    The unspecified address connects to loopback.
    Source: is_loopback() and is_dhcp() in gate.bpf.c.
    """
    if flow.daddr.is_loopback or flow.daddr.is_unspecified:
        return True
    return flow.proto == UDP and (str(flow.daddr), flow.sport, flow.dport) in DHCP


@dataclass(frozen=True, slots=True)
class Selector:
    """RFC 4301's selector as Linux holds it: networks, protocol, masked ports.

    A port matches when (flow port ^ port) & mask is 0; mask 0 is any port.
    `proto` 0 is any protocol, `ifindex` 0 any interface.
    Source: struct xfrm_selector in linux/xfrm.h; __xfrm4_selector_match().
    """

    src: Network
    dst: Network
    proto: int = 0
    sport: int = 0
    sport_mask: int = 0
    dport: int = 0
    dport_mask: int = 0
    ifindex: int = 0

    @property
    def reply(self) -> Selector:
        """What comes back, as strongSwan has it: the ends exchanged, and from any interface.

        Of ICMP the ports are type and code, both ways; unless they are 0. Source: ts2selector()
        in strongSwan's kernel_netlink_ipsec.c.
        """
        sport, dport = (self.sport, self.sport_mask), (self.dport, self.dport_mask)
        if self.proto not in ICMP or not (self.sport or self.dport):
            sport, dport = dport, sport
        return Selector(self.dst, self.src, self.proto, *sport, *dport)

    def matches(self, flow: Flow) -> bool:
        """Tell whether the flow is in the selector; its source must be known.

        Raises: ValueError if the flow has no source address yet.
        """
        if flow.saddr is None:
            raise ValueError(f"{flow} has no source address: resolve its route first")
        return (
            self.proto in (0, flow.proto)
            and flow.daddr in self.dst
            and flow.saddr in self.src
            and not (flow.sport ^ self.sport) & self.sport_mask
            and not (flow.dport ^ self.dport) & self.dport_mask
        )


@dataclass(frozen=True, slots=True)
class TrafficSelector:
    """One side of what a CHILD_SA protects; `ports` is an inclusive range, `proto` 0 any.

    Source: RFC 7296 section 3.13.
    """

    network: Network
    proto: int = 0
    ports: tuple[int, int] = (0, PORT_MASK)

    def contains(self, address: Address, proto: int, port: int) -> bool:
        """Tell whether one end of a flow is inside."""
        return (
            address in self.network
            and self.proto in (0, proto)
            and self.ports[0] <= port <= self.ports[1]
        )
