"""How the packets of another network namespace leave: through this host's SPD, or around it.

    inside   a route there gives the source address and the device
    link     a veth whose other end is here leads to this host; anything else around it
    here     the kernel says what this host does with such a packet when it arrives

Rules of this module:
- Ask the kernel (RTM_GETROUTE) in both namespaces; compute nothing from the tables. These only show
  where the answer can change.
- What cannot be known for sure is "around", with the reason in words.
- A bridge carries a packet to whom its frame is addressed. So the packets come to this host only if
  their gateway, or their destination, is an address of this host.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial

from ipsecgate.core.codec.forwarding import decode_packet, encode_packet_get
from ipsecgate.core.codec.links import decode_nsid, encode_nsid_get
from ipsecgate.core.codec.rtnetlink import Link as TunnelLink
from ipsecgate.core.model.flow import Address, FlowPath, Network, Origin
from ipsecgate.core.model.namespace import Arrival, Devices, Route, WayOut, arrival
from ipsecgate.core.model.prefixes import PrefixSet, as_network, compress, partition
from ipsecgate.core.model.value import value
from ipsecgate.core.nat.forwarded import Forwarding
from ipsecgate.edges.kernel.here import (
    NETLINK_ROUTE,
    Here,
    prefixes_in,
    read_addresses,
    read_links,
    read_nat,
)
from ipsecgate.edges.kernel.namespaces import Namespace
from ipsecgate.edges.kernel.netlink import Requests
from ipsecgate.edges.kernel.routes import ask_link, is_tun, path_into

LOOKUPS_PER_TURN = 32  # destinations, before the event loop gets a turn
OUT_OF_VRF = "its route leaves the VRF of its device, which may have another source than the route"


@value
class Resolved:
    """The paths of an origin, and the links of the gate's namespace that they depend on."""

    paths: tuple[tuple[Network, FlowPath], ...]
    used: frozenset[int] = frozenset()


async def paths(
    namespace: Namespace,
    origin: Origin,
    destinations: Sequence[Network],
    here: Here,
    *,
    floor: bool,
) -> Resolved:
    """Return where the flows of an origin lead, by destination; the longest prefix wins.

    `floor`: the host floor is in force. Raises: OSError, DecodeError.
    """
    there = await read_nat(namespace)
    forwarding = Forwarding(there, here.nat, here.links, here.addresses, floor)
    found: list[tuple[Network, FlowPath]] = []
    ways, used = await _ways(namespace, origin.device, destinations, here)
    for count, (network, way) in enumerate(ways, start=1):
        found += forwarding.paths(network, way)
        if count % LOOKUPS_PER_TURN == 0:
            await asyncio.sleep(0)
    return Resolved(compress(found), used)


async def ways_out(
    namespace: Namespace, destinations: Sequence[Network], here: Here, device: int = 0
) -> tuple[tuple[Network, WayOut], ...]:
    """Return how flows from a namespace leave, by destination; the longest prefix wins.

    `device`: that their sockets are bound to, 0: none. Raises: OSError, DecodeError.
    """
    return compress((await _ways(namespace, device, destinations, here))[0])


async def _ways(
    namespace: Namespace, device: int, destinations: Sequence[Network], here: Here
) -> tuple[list[tuple[Network, WayOut]], frozenset[int]]:
    """Return the way to each network at which the answer can change, and the links used here."""
    async with AsyncExitStack() as stack:
        inside = await stack.enter_async_context(Requests(NETLINK_ROUTE, namespace.socket))
        host = await stack.enter_async_context(Requests(NETLINK_ROUTE))
        links, addresses = await read_links(inside), await read_addresses(inside)
        netns = _id_of_gate(inside)
        prefixes = here.prefixes | await prefixes_in(inside, PrefixSet(destinations), addresses)
        arrivals = {
            index: arrival(link, netns, here.links, here.ingress) for index, link in links.items()
        }
        has_tun = any(link.kind == "tun" for link in here.links.values())
        devices = Devices(links, addresses) if device else None
        asking = _Asking(inside, host, device, arrivals, has_tun=has_tun, devices=devices)
        found = []
        for count, (piece, address) in enumerate(
            partition(destinations, map(as_network, prefixes)), start=1
        ):
            found.append((piece, asking.way(address)))
            if count % LOOKUPS_PER_TURN == 0:
                await asyncio.sleep(0)
    peers = {link.peer for link in links.values() if link.kind == "veth"}
    masters = {here.links[peer].master for peer in peers if peer in here.links}
    return found, frozenset(peers | masters | {way.link for _, way in found})


class _Asking:
    """Asks both namespaces about destinations.

    `arrivals`: by the index of the link inside. `has_tun`: a daemon here may do ESP itself, behind
    a TUN device. Its SAs protect the host's flows, which are routed into that device; others must
    be routed there as well. `devices`: inside, if the sockets are bound to a device.
    """

    def __init__(
        self,
        inside: Requests,
        host: Requests,
        device: int,
        arrivals: Mapping[int, Arrival | str],
        *,
        has_tun: bool,
        devices: Devices | None,
    ) -> None:
        self._inside = inside
        self._host = host
        self._device = device
        self._has_tun = has_tun
        self._devices = devices
        self._links: dict[int, TunnelLink | None] = {}
        self._arrivals = arrivals
        self._gateways: dict[tuple[int, Address], bool] = {}

    def way(self, to: Address) -> WayOut:
        """Return the way to a destination."""
        route = _ask(self._inside, to, leaves=self._device)
        if route is None or route.source is None:
            return WayOut(None, reason="its namespace has no route to this destination")
        if route.is_local:
            return WayOut(to)
        if self._devices is not None and to.version == 6:
            certain = self._devices.source(route.source, self._device, route.link)
            if certain is None:
                return WayOut(None, reason=OUT_OF_VRF)
        where = self._arrivals.get(route.link, "its packets leave by a device that is gone")
        if isinstance(where, str):
            return WayOut(None, reason=where)
        onward = _ask(self._host, to, route.source, where.link)
        if onward is not None and onward.is_local:
            return WayOut(to)  # it is for this host itself, so it never leaves it
        if where.is_bridged and not self._is_ours(route, where):
            hop = f"to {route.gateway}, which is not this host" if route.gateway else "there"
            return WayOut(
                None, reason=f"a bridge carries its packets {hop}, around this host's SPD"
            )
        if onward is None:
            return WayOut(None, reason=f"this host does not forward packets from {route.source}")
        return self._through(to, WayOut(route.source, where.link, onward.link, onward.gateway))

    def _through(self, to: Address, way: WayOut) -> WayOut:
        """Return a way with what the device does by which this host sends the packets on."""
        link = self._link(way.link)
        path = path_into(way.source, link)
        if path.outside:
            return WayOut(None, reason=path.outside)
        own = _ask(self._host, to) if self._has_tun else None
        if own is not None and own.link != way.link:
            there = self._link(own.link)
            if there is not None and is_tun(there):
                text = f"this host sends its packets by another device than {there.name}"
                return WayOut(None, reason=f"{text}, which protects the host's own")
        return replace(way, if_id=path.if_id, mark=path.mark)

    def _link(self, index: int) -> TunnelLink | None:
        if index not in self._links:
            self._links[index] = ask_link(self._host, index)
        return self._links[index]

    def _is_ours(self, route: Route, where: Arrival) -> bool:
        """Tell whether the gateway is an address of this host, behind the bridge."""
        if route.gateway is None:
            return False
        key = where.link, route.gateway
        if key not in self._gateways:
            link = where.link if route.gateway.is_link_local else 0
            found = _ask(self._host, route.gateway, leaves=link)
            self._gateways[key] = found is not None and found.is_local
        return self._gateways[key]


def _ask(
    requests: Requests,
    to: Address,
    source: Address | None = None,
    arrives: int = 0,
    leaves: int = 0,
) -> Route | None:
    """Return the route of a packet, None if there is none; the kernel would not send it, either."""
    encode = partial(encode_packet_get, to, source=source, arrives=arrives, leaves=leaves)
    try:
        return next(iter(requests.ask(encode, decode_packet)), None)
    except OSError:
        return None


def _id_of_gate(inside: Requests) -> int:
    """Return the id that a namespace has for ours, -1 if it has none."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return next(iter(inside.ask(partial(encode_nsid_get, own), decode_nsid)), -1)
    except OSError:
        return -1
    finally:
        os.close(own)
