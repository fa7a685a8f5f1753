"""How packets leave a network namespace: links, routes, and the ways out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from ipsecgate.core.model.flow import Address, Network
from ipsecgate.core.model.value import value

AROUND = "only an SPD in that namespace can protect it"


@value
class Link:
    """A network device of one namespace.

    `kind`: as `ip -d link` shows it, "" for a device of a driver. `peer`: the index of the device
    that it leads to (a veth's other end, a macvlan's lower device), 0: none. `peer_netns`: the id
    of the peer's namespace, None: this one. `master`: its bridge or VRF, 0: none.
    `has_program`: an XDP program sees the packets that arrive here first.
    """

    index: int
    name: str
    kind: str
    peer: int = 0
    peer_netns: int | None = None
    master: int = 0
    is_loopback: bool = False
    is_up: bool = True
    has_program: bool = False


@value
class Route:
    """What the kernel would do with a packet. `link`: the output device. `source`: of a new one.

    `is_local`: it is for this namespace itself. `gateway`: None if the destination is on the link.
    """

    link: int
    source: Address | None = None
    gateway: Address | None = None
    is_local: bool = False


@value
class Arrival:
    """Where the packets of another namespace arrive in the gate's, as those of the first link do.

    `link`: the device that the gate's namespace receives them at: the veth's other end, or the
    bridge that this is a port of. `is_bridged`: the bridge may also carry them to another port.
    """

    link: int
    is_bridged: bool


def arrival(
    link: Link | None, gate_netns: int, here: Mapping[int, Link], ingress: Set[int]
) -> Arrival | str:
    """Return where packets arrive that leave another namespace by this link.

    `gate_netns`: the id that the other namespace has for the gate's. `here`: the links of the
    gate's namespace, and `ingress` those of them with a filter for what arrives. If the packets
    pass around the gate's SPD, or may do, this returns why.
    """
    if link is None:
        return "its packets leave by a device that is gone"
    name = f"{link.kind} {link.name}" if link.kind else f"device {link.name}"
    if link.kind != "veth":
        return f"its packets leave by {name}, around this host's SPD: {AROUND}"
    if link.peer_netns is None or gate_netns < 0 or link.peer_netns != gate_netns:
        return (
            f"its packets leave by {name} into another namespace than the gate's, around this "
            f"host's SPD: {AROUND}"
        )
    peer = here.get(link.peer)
    if peer is None:
        return f"the other end of its {name} is gone"
    master = here.get(peer.master)
    if peer.master and (master is None or master.kind != "bridge"):
        kind = master.kind or "a device" if master else "a device"
        where = f"{kind} {master.name}" if master else kind
        return f"its packets go into {where}, which may send them around this host's SPD"
    for seen in (peer, *([master] if master else ())):
        if seen.has_program or seen.index in ingress:
            return (
                f"a program or filter on {seen.name} (XDP or tc ingress) may send its packets "
                "around this host's SPD"
            )
    return Arrival(master.index if master else peer.index, is_bridged=master is not None)


@value
class WayOut:
    """How a flow leaves another namespace.

    `source`: of an unbound socket; None: its packets do not come to the gate's SPD, for `reason`.
    `arrives` and `link` are the devices by which the gate's host receives it and sends it on;
    `link` is 0 if it is for the host itself. `if_id` and `mark`: of a tunnel device, as in
    `FlowPath`.
    """

    source: Address | None
    arrives: int = 0
    link: int = 0
    gateway: Address | None = None
    if_id: int = 0
    mark: int | None = None
    reason: str = ""


@value
class DeviceAddress:
    """An address of a device, with the network that its prefix length makes.

    `is_global`: its scope. `is_secondary`: of IPv4, not the first of its network. `is_usable`: of
    IPv6, neither deprecated nor tentative.
    """

    link: int
    address: Address
    network: Network
    is_global: bool = True
    is_secondary: bool = False
    is_usable: bool = True


def masquerade_address(
    addresses: Iterable[DeviceAddress], link: int, hop: Address
) -> Address | None:
    """Return the address that MASQUERADE gives to packets that leave by a link, None if unknown.

    `addresses`: in the kernel's order. `hop`: the gateway, or the destination if it is on the link.
    For IPv6 the kernel's choice is known only if there is one.
    Source: inet_select_addr(), ipv6_dev_get_saddr().
    """
    usable = [
        item
        for item in addresses
        if item.link == link
        and item.address.version == hop.version
        and item.is_global
        and item.is_usable
        and not item.is_secondary
    ]
    if hop.version == 6:
        return usable[0].address if len(usable) == 1 else None
    near = (item.address for item in usable if hop in item.network)
    return next(near, usable[0].address if usable else None)


@value
class Devices:
    """The links of a namespace by index, and their addresses."""

    links: Mapping[int, Link]
    addresses: tuple[DeviceAddress, ...]

    def source(self, routed: Address, device: int, link: int) -> Address | None:
        """Return the source of an IPv6 socket that is bound to a device, None if it is not certain.

        `routed`: the source of the route, which leaves by `link`. If it leaves the VRF of the
        device, Linux 6.11 takes an address of the VRF, as do stable kernels since August 2024;
        older ones take that of the route. So it is certain if both are the same.
        Source: ip6_route_get_saddr(), ipv6_dev_get_saddr().
        """
        vrf = _vrf_of(device, self.links)
        if not vrf or _vrf_of(link, self.links) == vrf:
            return routed
        own = {
            item.address
            for item in self.addresses
            if _vrf_of(item.link, self.links) == vrf
            and item.address.version == 6
            and item.is_global
            and item.is_usable
        }
        return routed if own == {routed} else None


def _vrf_of(index: int, links: Mapping[int, Link]) -> int:
    """Return the VRF of a device, which may be one itself; 0: none."""
    link = links.get(index)
    for one in (link, links.get(link.master) if link else None):
        if one is not None and one.kind == "vrf":
            return one.index
    return 0
