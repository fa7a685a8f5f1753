"""Which source address the kernel would choose for an unbound socket, and whether through a tunnel.

The answer is kept up to date. A tunnel is the TUN device of an IKE daemon that does userspace ESP:
strongSwan's kernel-libipsec names it ipsec0, ipsec1, and so on.

Rules of this module:
- Ask the kernel (RTM_GETROUTE); compute nothing from the table. Only the kernel's answer accounts
  for rules, metrics and `src` hints. The table only shows where the answer can change.
- Ask again after any change of rules, addresses or links, after a change of routes that touches a
  followed destination, and after an overrun of the watching socket.
- Handle the first change at once: strongSwan adds a route with a `src` hint just when an SA comes
  up. Changes that follow within `PAUSE` are handled together.
- When a tunnel loses its route, report its destinations as outside the tunnel at once, before
  asking the kernel which route replaces it: until then the flow would leave in the clear.

Answers hold for flows of root without a mark. Rules by mark, user, port or protocol are not
supported, nor are sources that differ between the next hops of one route.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from socket import AF_INET, AF_INET6

from ipsecgate.core.codec.netlink import DecodeError
from ipsecgate.core.codec.rtnetlink import (
    decode_link,
    decode_prefixes,
    decode_removed_routes,
    decode_route,
    encode_link_get,
    encode_route_dump,
    encode_route_get,
    encode_rule_dump,
    only_routes,
)
from ipsecgate.core.model.events import SourcesResolved
from ipsecgate.core.model.flow import Address, Network
from ipsecgate.core.model.prefixes import (
    Prefix,
    PrefixSet,
    Source,
    as_network,
    as_prefix,
    compress,
    partition,
)
from ipsecgate.edges.kernel.netlink import RawNetlinkSocket, Requests
from ipsecgate.errors import GateError

NETLINK_ROUTE = 0
# RTNLGRP_LINK, IPV4_IFADDR, IPV4_ROUTE, IPV4_RULE, IPV6_IFADDR, IPV6_ROUTE, IPV6_RULE
GROUPS = (1, 5, 7, 8, 9, 11, 19)
PAUSE = 0.02  # seconds
LOOKUPS_PER_TURN = 64  # about a millisecond, before the event loop gets a turn
TUN = "ipsec"  # the device's name without its number; source: kernel_libipsec_plugin.c


class RoutesError(GateError):
    """The kernel's routes can't be read."""


class Routes:
    """Resolves the sources for the followed destinations, in this network namespace.

    `deliver` is called when they are known, and when they change.
    """

    def __init__(self, deliver: Callable[[SourcesResolved], None]) -> None:
        self._deliver = deliver
        self._destinations: tuple[Network, ...] = ()
        self._followed = PrefixSet(())  # the same destinations
        self._due = asyncio.Event()
        self._delivered: SourcesResolved | None = None
        self._tuns: set[int] = set()  # interface indexes
        self._losses = 0  # how often a followed route, or a link, was removed

    def follow(self, destinations: Iterable[Network]) -> None:
        """Replace the destinations to resolve."""
        self._destinations = tuple(destinations)
        self._followed = PrefixSet(self._destinations)
        self._delivered = None
        self._due.set()

    async def run(self) -> None:
        """Watch and resolve until cancelled. Raises: RoutesError, DecodeError."""
        watch = RawNetlinkSocket(NETLINK_ROUTE, self._on_change, lambda _error: self._due.set())
        try:
            watch.join(GROUPS)
            while True:
                await self._due.wait()
                self._due.clear()
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
            return _ask_route(requests, address)[0]

    async def prefixes(self) -> set[Network]:
        """Return the networks inside the followed destinations at which the answer can change.

        These are the routes of all tables, including the addresses in the local table, and the
        `to` selectors of rules. Raises: OSError, DecodeError.
        """
        async with Requests(NETLINK_ROUTE) as requests:
            return await self._prefixes(requests)

    async def resolve(self) -> tuple[Source, ...]:
        """Ask the kernel, and return the sources. Raises: OSError, DecodeError."""
        return (await self._resolve()).sources

    async def _resolve(self) -> SourcesResolved:
        sources: list[Source] = []
        links: list[tuple[Network, int]] = []
        async with Requests(NETLINK_ROUTE) as requests:
            pieces = partition(self._destinations, await self._prefixes(requests))
            for count, (piece, address) in enumerate(pieces, start=1):
                source, link = _ask_route(requests, address)
                sources.append((piece, source))
                links.append((piece, link))
                if count % LOOKUPS_PER_TURN == 0:
                    await asyncio.sleep(0)
            used = {link for _, link in links}
            self._tuns = {link for link in used if _is_tun(requests, link)}
        into_tun = compress((piece, link in self._tuns) for piece, link in links)
        if not self._tuns:
            return SourcesResolved(compress(sources))
        return SourcesResolved(compress(sources), into_tun, min(self._tuns))

    async def _prefixes(self, requests: Requests) -> set[Network]:
        found: set[Prefix] = set()
        for family in (AF_INET, AF_INET6):
            for encode in (encode_route_dump, encode_rule_dump):
                try:
                    found.update(
                        await requests.dump(partial(encode, family), self._followed_prefixes)
                    )
                except OSError as error:
                    if error.errno != errno.EAFNOSUPPORT:
                        raise
                    # The kernel has no IPv6, or its module is not loaded: it routes none.
        return {as_network(item) for item in found}

    def _followed_prefixes(self, datagram: bytes) -> list[Prefix]:
        return [item for item in decode_prefixes(datagram) if self._followed.contains(item)]

    async def _update(self) -> None:
        """Resolve, and deliver the result if it differs from the last."""
        before = self._losses
        resolved = await self._resolve()
        if self._losses != before:
            # Some answers may be older than the loss. Report no tunnel; `_due` is set again.
            resolved = replace(resolved, into_tun=())
        if resolved != self._delivered:
            self._delivered = resolved
            self._deliver(resolved)

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
        if not removed or self._delivered is None:
            return
        uncovered = PrefixSet(as_network(item) for item in removed if item is not None)
        into_tun = tuple(
            (item, into and None not in removed and not uncovered.overlaps(as_prefix(item)))
            for item, into in self._delivered.into_tun
        )
        if into_tun != self._delivered.into_tun:
            self._delivered = replace(self._delivered, into_tun=into_tun)
            self._deliver(self._delivered)

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


def _ask_route(requests: Requests, address: Address) -> tuple[Address | None, int]:
    """Return a destination's source and interface index; None and 0 if it is unreachable."""
    try:
        found = requests.ask(partial(encode_route_get, address), decode_route)
    except OSError:
        return None, 0  # whatever the reason, the kernel would not send there either
    return found[0] if found else (None, 0)


def _is_tun(requests: Requests, link: int) -> bool:
    try:
        found = requests.ask(partial(encode_link_get, link), decode_link)
    except OSError:
        return False  # the interface was removed meanwhile, or the route had none
    return any(kind == "tun" and name.startswith(TUN) for name, kind in found)
