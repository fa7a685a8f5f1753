"""Where the kernel would send the flows of each origin: with which source, and into which tunnel.

The answer is kept up to date. A tunnel is an XFRM or VTI interface, or the TUN device of an IKE
daemon that does userspace ESP: strongSwan's kernel-libipsec names it ipsec0, ipsec1, and so on.

Rules of this module:
- Ask the kernel (RTM_GETROUTE); compute nothing from the table. Only the kernel's answer accounts
  for rules, metrics and `src` hints. The table only shows where the answer can change.
- Ask again after any change of rules, addresses or links, after a change of routes that touches a
  followed destination, and after an overrun of the watching socket.
- Handle the first change at once: strongSwan adds a route with a `src` hint just when an SA comes
  up. Changes that follow within `PAUSE` are handled together.
- When a TUN device loses its route, report its destinations as outside it at once, before asking
  the kernel which route replaces it: until then the flow would leave in the clear.

Answers hold for flows of root. Rules by user, port, protocol or type of service are not supported,
nor are sources that differ between the next hops of one route.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from ipsecgate.core.codec.netlink import DecodeError
from ipsecgate.core.codec.rtnetlink import (
    VTI,
    Link,
    decode_link,
    decode_prefixes,
    decode_removed_routes,
    decode_route,
    encode_link_get,
    encode_route_get,
    only_routes,
    rule_conditions,
)
from ipsecgate.core.model.events import OriginGone, PathsResolved, ServicesResolved
from ipsecgate.core.model.flow import HOST, Address, FlowPath, Network, Origin
from ipsecgate.core.model.namespace import DeviceAddress, Devices
from ipsecgate.core.model.nat import Device, Service
from ipsecgate.core.model.prefixes import (
    Prefix,
    PrefixSet,
    Route,
    as_network,
    as_prefix,
    compress,
    partition,
)
from ipsecgate.core.nat.translation import Nat
from ipsecgate.core.tables.layout import IF_IDS
from ipsecgate.edges.kernel.here import NETLINK_ROUTE, prefixes_in, read_addresses, read_links
from ipsecgate.edges.kernel.netlink import RawNetlinkSocket, Requests
from ipsecgate.edges.kernel.translations import Translations
from ipsecgate.errors import GateError

# RTNLGRP_LINK, IPV4_IFADDR, IPV4_ROUTE, IPV4_RULE, IPV6_IFADDR, IPV6_ROUTE, IPV6_RULE
GROUPS = (1, 5, 7, 8, 9, 11, 19)
PAUSE = 0.02  # seconds
LOOKUPS_PER_TURN = 64  # about a millisecond, before the event loop gets a turn
TUN = "ipsec"  # the device's name without its number; source: kernel_libipsec_plugin.c


Found = PathsResolved | OriginGone | ServicesResolved
Way = tuple[Network, Address | None, int]
"""A destination, with the source and the interface index of its route; None and 0: no route."""


class RoutesError(GateError):
    """The kernel's routes can't be read."""


class Conditions(NamedTuple):
    """On what routing rules depend: whether on source addresses, and on which bits of marks."""

    by_source: bool
    marks: int


class Routes:
    """Resolves the paths to the followed destinations, in this network namespace.

    `deliver` is called when they are known, and when they change.
    """

    def __init__(self, deliver: Callable[[Found], None]) -> None:
        self._deliver = deliver
        self._destinations: tuple[Network, ...] = ()
        self._followed = PrefixSet(())  # the same destinations
        self._origins = [HOST]
        self._due = asyncio.Event()
        self._is_told = False  # which destinations; before, a predecessor's paths are in force
        self._delivered: dict[Origin, PathsResolved] = {}
        self._tuns: set[int] = set()  # interface indexes
        self._nat: Nat | None = None  # rules that are not in `_translations` yet
        self._translations = Translations()
        self._services: tuple[Service, ...] = ()
        self._losses = 0  # how often a followed route, or a link, was removed

    def follow(self, destinations: Iterable[Network]) -> None:
        """Replace the destinations to resolve."""
        self._destinations = tuple(destinations)
        self._followed = PrefixSet(self._destinations)
        self._delivered = {}
        self._is_told = True
        self._due.set()

    def follow_origin(self, origin: Origin) -> None:
        """Resolve the paths of the flows that begin there, as well."""
        if origin not in self._origins:
            self._origins.append(origin)
            self._due.set()

    def translate(self, nat: Nat) -> None:
        """Resolve again, with these NAT rules."""
        self._nat = nat
        self._due.set()

    async def run(self) -> None:
        """Watch and resolve until cancelled. Raises: RoutesError, DecodeError."""
        watch = RawNetlinkSocket(NETLINK_ROUTE, self._on_change, lambda _error: self._due.set())
        try:
            watch.join(GROUPS)
            while True:
                await self._due.wait()
                self._due.clear()
                if self._is_told:
                    await self._update()
                await asyncio.sleep(PAUSE)
        except OSError as error:
            raise RoutesError(
                f"cannot read the kernel's routes: {error}", hint="see the kernel's log (dmesg)"
            ) from error
        finally:
            watch.close()

    async def source_for(self, address: Address) -> Address | None:
        """Return the source for a destination, None if it is unreachable. Raises: OSError."""
        async with Requests(NETLINK_ROUTE) as requests:
            return _ask_route(requests, address, HOST)[0]

    async def prefixes(self) -> set[Network]:
        """Return the networks inside the followed destinations at which the answer can change.

        These are the routes of all tables, including the addresses in the local table, the `to`
        selectors of rules, and what `prefixes_in` adds. Raises: OSError, DecodeError.
        """
        async with Requests(NETLINK_ROUTE) as requests:
            return (await self._prefixes(requests, await read_addresses(requests)))[0]

    async def resolve(self) -> tuple[Route, ...]:
        """Ask the kernel, and return the paths from here. Raises: OSError, DecodeError."""
        (resolved,) = [one async for one in self._resolve() if one.origin == HOST]
        return resolved.paths

    async def _resolve(self) -> AsyncIterator[PathsResolved]:
        """Yield the paths of each origin; `HOST` comes last, and knows the tunnels of all."""
        links: dict[int, Link | None] = {}  # those in use, by interface index; None: gone
        devices: Devices | None = None
        async with Requests(NETLINK_ROUTE) as requests:
            addresses = await read_addresses(requests)
            prefixes, conditions = await self._prefixes(requests, addresses)
            translations = self._translations
            prefixes.update(filter(self._follows, translations.networks))
            await translations.refresh(requests)
            pieces = partition(self._destinations, prefixes)
            for origin in self._origins[::-1]:
                ways: list[Way] = []
                for count, (piece, address) in enumerate(pieces, start=1):
                    ways.append((piece, *_ask_route(requests, address, origin)))
                    if count % LOOKUPS_PER_TURN == 0:
                        await asyncio.sleep(0)
                for index in {link for *_, link in ways} - links.keys():
                    links[index] = ask_link(requests, index)
                found = []
                for count, ((piece, source, at), (_, to)) in enumerate(
                    zip(ways, pieces, strict=True), start=1
                ):
                    path, device = path_into(source, links[at]), _device(at, links[at])
                    path = translations.apply(requests, to, path, device)
                    if origin.device and source is not None and source.version == 6:
                        devices = devices or Devices(await read_links(requests), addresses)
                        path = replace(path, source=devices.source(source, origin.device, at))
                    found.append((piece, path))
                    if count % LOOKUPS_PER_TURN == 0:
                        await asyncio.sleep(0)
                paths = compress(found)
                if origin != HOST:
                    yield PathsResolved(paths, origin)
        yield self._from_here(paths, conditions, ways, links)

    def _follows(self, network: Network) -> bool:
        return self._followed.contains(as_prefix(network))

    def _from_here(
        self,
        paths: tuple[Route, ...],
        conditions: Conditions,
        ways: Iterable[Way],
        links: Mapping[int, Link | None],
    ) -> PathsResolved:
        tunnels = frozenset(index for index, link in links.items() if link and _is_tunnel(link))
        self._tuns = {index for index, link in links.items() if link and is_tun(link)}
        resolved = PathsResolved(
            paths, HOST, conditions.by_source, conditions.marks, tunnels=tunnels
        )
        if not self._tuns:
            return resolved
        into_tun = compress((piece, at in self._tuns) for piece, _, at in ways)
        return replace(resolved, into_tun=into_tun, tun=min(self._tuns))

    async def _prefixes(
        self, requests: Requests, addresses: Iterable[DeviceAddress]
    ) -> tuple[set[Network], Conditions]:
        """Return where the answer can change, and what else it depends on."""
        by_source, marks = False, 0

        def on_rules(datagram: bytes) -> None:
            nonlocal by_source, marks
            for names_source, mask in rule_conditions(datagram):
                by_source |= names_source
                marks |= mask

        found = await prefixes_in(requests, self._followed, addresses, on_rules)
        return {as_network(item) for item in found}, Conditions(by_source, marks)

    async def _update(self) -> None:
        """Resolve, and deliver what differs from the last result."""
        self._drop_lost_devices()
        if self._nat is not None:
            nat, self._nat = self._nat, None
            # Thousands of rules take a second.
            self._translations = await asyncio.to_thread(Translations, nat)
        before = self._losses
        async for resolved in self._resolve():
            # Some answers may be older than a loss. Then report no tunnel; `_due` is set again.
            found = resolved if self._losses == before else replace(resolved, into_tun=())
            if found != self._delivered.get(found.origin):
                self._delivered[found.origin] = found
                self._deliver(found)
        for origin in [one for one in self._origins if one.mark & ~found.marks]:
            self._forget(origin)  # no rule asks for its mark any more
        await self._update_services()

    async def _update_services(self) -> None:
        async with Requests(NETLINK_ROUTE) as requests:
            services = await self._translations.services(requests, self._followed)
        if services != self._services:
            self._services = services
            self._deliver(ServicesResolved(services))

    def _drop_lost_devices(self) -> None:
        """Forget the origins whose device is gone: another may get its index."""
        for origin in [one for one in self._origins if one.device]:
            try:
                socket.if_indextoname(origin.device)
            except OSError:
                self._forget(origin)

    def _forget(self, origin: Origin) -> None:
        self._origins.remove(origin)
        self._delivered.pop(origin, None)
        self._deliver(OriginGone(origin))

    def _withdraw_tunnels(self, lost: Iterable[tuple[int, Prefix | None]]) -> None:
        """Report at once which destinations no longer lead into a tunnel.

        `lost`: interface index and prefix of each removed route; None for a link that went down.
        """
        removed = []
        for link, destination in lost:
            if destination is None or self._followed.overlaps(destination):
                self._losses += 1
                if link in self._tuns:
                    removed.append(destination)
        delivered = self._delivered.get(HOST)
        if not removed or delivered is None:
            return
        uncovered = PrefixSet(as_network(item) for item in removed if item is not None)
        into_tun = tuple(
            (item, into and None not in removed and not uncovered.overlaps(as_prefix(item)))
            for item, into in delivered.into_tun
        )
        if into_tun != delivered.into_tun:
            self._delivered[HOST] = replace(delivered, into_tun=into_tun)
            self._deliver(self._delivered[HOST])

    def _on_change(self, datagram: bytes) -> None:
        try:
            self._withdraw_tunnels(decode_removed_routes(datagram))
            if only_routes(datagram) and not any(
                self._followed.overlaps(item) for item in decode_prefixes(datagram)
            ):
                return
        except DecodeError:
            pass  # something changed, even if we cannot read what
        self._due.set()


def _ask_route(requests: Requests, address: Address, origin: Origin) -> tuple[Address | None, int]:
    """Return a destination's source and interface index; None and 0 if it is unreachable."""
    encode = partial(encode_route_get, address, device=origin.device, mark=origin.mark)
    try:
        found = requests.ask(encode, decode_route)
    except OSError:
        return None, 0  # whatever the reason, the kernel would not send there either
    return found[0] if found else (None, 0)


def ask_link(requests: Requests, index: int) -> Link | None:
    """Return a link, None if there is none of that index."""
    try:
        found = requests.ask(partial(encode_link_get, index), decode_link)
    except OSError:
        return None  # it was removed meanwhile, or the route had none
    return next(iter(found), None)


def _device(index: int, link: Link | None) -> Device | None:
    return None if link is None else Device(index, link.name)


def path_into(source: Address | None, link: Link | None) -> FlowPath:
    """Return the path of flows that leave by a link."""
    if link is None:
        return FlowPath(source)
    if link.kind in VTI:
        return FlowPath(source, mark=link.mark)
    if link.kind != "xfrm":
        return FlowPath(source)
    if link.if_id is None:
        why = f"{link.name} takes the interface id of its packets, which the hooks cannot see"
        return FlowPath(source, outside=why)
    if not 0 < link.if_id <= IF_IDS:
        why = f"{link.name} has the interface id {link.if_id}, and the hooks know 1 to {IF_IDS}"
        return FlowPath(source, outside=why)
    return FlowPath(source, if_id=link.if_id)


def _is_tunnel(link: Link) -> bool:
    return link.kind == "xfrm" or link.kind in VTI


def is_tun(link: Link) -> bool:
    """Tell whether a link is the TUN device of an IKE daemon that does ESP itself."""
    return link.kind == "tun" and link.name.startswith(TUN)
