"""Flows, which applications ask for, and selectors, which policies match them with.

Rules of this module: ports and protocols are integers in host order; 0 means "any" in a selector
and "not chosen yet" in a flow. A v4-mapped IPv6 address is represented by its IPv4 address,
because that is what leaves the host.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import NamedTuple

from ipsecgate.core.model.value import value

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

TCP = 6
UDP = 17
PROTOCOLS = {"any": 0, "icmp": 1, "tcp": TCP, "udp": UDP, "ipv6-icmp": 58, "sctp": 132}
ICMP = (1, 58)
PROTOCOL_NAMES = {number: name for name, number in PROTOCOLS.items()}

PORT_MASK = 0xFFFF
ANY_PORT = (0, PORT_MASK)
# The ports that the kernel chooses from: net.ipv4.ip_local_port_range at its default.
EPHEMERAL = range(32768, 61000)
OPAQUE = (PORT_MASK, 0)  # a traffic selector for packets without ports, RFC 7296 3.13.1
DHCP = (("255.255.255.255", 68, 67), ("ff02::1:2", 546, 547))
ANY_V4 = IPv4Network("0.0.0.0/0")
ANY_V6 = IPv6Network("::/0")


def unmap(address: Address) -> Address:
    """Return the IPv4 address of ::ffff:a.b.c.d, and any other address unchanged.

    Source: RFC 4291 section 2.5.5.2.
    """
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def parse_address(text: str) -> Address:
    """Parse an address; a v4-mapped one becomes IPv4. Raises: ValueError."""
    return unmap(ip_address(text))


class Origin(NamedTuple):
    """Where flows begin: network namespace and device of their sockets, as in `Flow`.

    `mark`: the bits of their mark that routing rules ask for.
    """

    netns: int = 0
    device: int = 0
    mark: int = 0


HOST = Origin()


@value
class FlowPath:
    """Where routing leads the flows of an origin to a destination.

    `source`: the address that an unbound socket gets, None: there is no route, or it is uncertain.
    The kernel looks up the SPD for the flow as it begins. The other fields are for a second
    look-up: behind an XFRM interface with this `if_id`, behind a VTI with this `mark`, and once the
    host has made `translated` the source, by the `rule` that is named. `outside` says in words why
    the SPD is never asked, "" if it is.
    """

    source: Address | None
    if_id: int = 0
    mark: int | None = None
    translated: Address | None = None
    outside: str = ""
    rule: str = ""

    @property
    def is_tunneled(self) -> bool:
        """Tell whether a tunnel device looks up the SPD."""
        return bool(self.if_id) or self.mark is not None

    @property
    def is_bent(self) -> bool:
        """Tell whether the SPD is not asked just once, about the flow as it begins."""
        return self.is_tunneled or self.translated is not None or bool(self.outside)


@value
class Flow:
    """A flow that an application asks for, by connect() or by sending a datagram.

    `saddr` None and `sport` 0: the socket is not bound, so the kernel will choose them.
    `mark` is the socket's SO_MARK, 0 in another namespace, which it never leaves. `device`:
    interface index that it is bound to, 0: none. `netns`: cookie of its network namespace, 0: the
    gate's own. `if_id`: of the XFRM interface that looks up the SPD for it, 0: none. For ICMP,
    `dport` is type << 8 | code.
    Source: US 7,028,332 claim 1 (source and destination address, protocol, ports).
    """

    daddr: Address
    proto: int
    dport: int
    saddr: Address | None = None
    sport: int = 0
    mark: int = 0
    device: int = 0
    netns: int = 0
    if_id: int = 0

    def __str__(self) -> str:
        host = f"[{self.daddr}]" if self.daddr.version == 6 else str(self.daddr)
        name = PROTOCOL_NAMES.get(self.proto, self.proto)
        if self.proto in ICMP:
            return f"{name} {self.daddr} type {self.dport >> 8}"
        return f"{name} {host}:{self.dport}" if self.dport else f"{name} {self.daddr}"


def is_exempt(flow: Flow) -> bool:
    """Return whether the hooks exempt a flow because of its addresses: loopback and DHCP.

    The kernel connects the unspecified address to loopback.
    Source: is_loopback() and is_dhcp() in gate.bpf.c.
    """
    if flow.daddr.is_loopback or flow.daddr.is_unspecified:
        return True
    return flow.proto == UDP and (str(flow.daddr), flow.sport, flow.dport) in DHCP


@value
class Selector:
    """RFC 4301's selector in Linux's form: networks, protocol, masked ports.

    A port matches if (flow's port ^ port) & mask is 0, so mask 0 matches any port.
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
        """The selector of the replies, as strongSwan installs it: reversed, and on any interface.

        For ICMP, sport and dport hold type and code in both directions, so they are not swapped
        unless they are 0. Source: ts2selector() in strongSwan's kernel_netlink_ipsec.c.
        """
        sport, dport = (self.sport, self.sport_mask), (self.dport, self.dport_mask)
        if self.proto not in ICMP or not (self.sport or self.dport):
            sport, dport = dport, sport
        return Selector(self.dst, self.src, self.proto, *sport, *dport)

    def matches(self, flow: Flow) -> bool:
        """Return whether the flow matches. Raises: ValueError if it has no source address yet."""
        if flow.saddr is None:
            raise ValueError(f"{flow} has no source address: resolve its route first")
        return (
            self.proto in (0, flow.proto)
            and flow.daddr in self.dst
            and flow.saddr in self.src
            and not (flow.sport ^ self.sport) & self.sport_mask
            and not (flow.dport ^ self.dport) & self.dport_mask
        )


@value
class TrafficSelector:
    """One side of a CHILD_SA's traffic. `ports` is an inclusive range; `proto` 0 is any.

    Source: RFC 7296 section 3.13.
    """

    network: Network
    proto: int = 0
    ports: tuple[int, int] = (0, PORT_MASK)

    def contains(self, address: Address, proto: int, port: int) -> bool:
        """Return whether one end of a flow matches."""
        return (
            address in self.network
            and self.proto in (0, proto)
            and self.ports[0] <= port <= self.ports[1]
        )
