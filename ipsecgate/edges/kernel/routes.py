"""Which source address the kernel would choose for an unbound socket, and whether by a tunnel.

It is kept up to date. The tunnel is the TUN device of an IKE daemon that does ESP itself:
strongSwan's kernel-libipsec names it ipsec0, ipsec1, and so on.

Rules of this module:
- The kernel is asked (RTM_GETROUTE), nothing is computed from the table: what it answers holds
  for rules, metrics and `src` hints alike. The table only tells where the answer can change.
- A change of routes, rules, addresses or links is a reason to ask again, whatever it says;
  one of routes only if it touches a destination. An overrun of the watching socket is a change.
- The first change is answered at once: strongSwan adds a route with a `src` hint just when an
  SA comes up. Those that follow within `PAUSE` share one answer.
- A tunnel's route that goes is told before the kernel is asked what takes its place: meanwhile
  the flow would leave in clear.

It sees flows of root without a mark. Rules by mark, user, port or protocol, and sources that
differ between the next hops of one route, are beyond it.

pyroute2 is the transport only; why, is said in `ipsecgate.edges.kernel.netlink`.
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
    decode_lost,
    decode_prefixes,
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
    compress,
    network,
    partition,
    prefix,
)
from ipsecgate.edges.kernel.netlink import RawNetlinkSocket, Requests
from ipsecgate.errors import GateError

NETLINK_ROUTE = 0
# RTNLGRP_LINK, IPV4_IFADDR, IPV4_ROUTE, IPV4_RULE, IPV6_IFADDR, IPV6_ROUTE, IPV6_RULE
GROUPS = (1, 5, 7, 8, 9, 11, 19)
PAUSE = 0.02
BATCH = 64  # lookups between two turns of the loop, about a millisecond
TUN = "ipsec"  # Source: kernel_libipsec_plugin.c


class RoutesError(GateError):
    """The kernel's routes can't be read."""


class Routes:
    """Tell the sources for the destinations that `follow` names, in this network namespace.

    `deliver` is called when they are known, and when they changed.
    """

    def __init__(self, deliver: Callable[[SourcesResolved], None]) -> None:
        self._deliver = deliver
        self._destinations: tuple[Network, ...] = ()
        self._cover = PrefixSet(())
        self._due = asyncio.Event()
        self._last: SourcesResolved | None = None
        self._tuns: set[int] = set()
        self._closed = 0  # how often a route or a link went

    def follow(self, destinations: Iterable[Network]) -> None:
        """Resolve these from now on, instead of those before."""
        self._destinations = tuple(destinations)
        self._cover = PrefixSet(self._destinations)
        self._last = None
        self._due.set()

    async def run(self) -> None:
        """Watch and resolve until cancelled. Raises: RoutesError, DecodeError."""
        watch = RawNetlinkSocket(NETLINK_ROUTE, self._on_change, lambda _error: self._due.set())
        try:
            await watch.join(GROUPS)
            while True:
                await self._due.wait()
                self._due.clear()
                await self._tell()
                await asyncio.sleep(PAUSE)
        except OSError as error:
            raise RoutesError(
                f"cannot read the kernel's routes: {error}", hint="see the kernel's log (dmesg)"
            ) from error
        finally:
            watch.close()

    async def source_for(self, address: Address) -> Address | None:
        """Return the source for a destination, None where it can't be reached. Raises: OSError."""
        async with Requests(NETLINK_ROUTE) as requests:
            return _route(requests, address)[0]

    async def prefixes(self) -> set[Network]:
        """Return where the answer can change inside the destinations that are followed.

        Those are the routes of all tables, the local one's addresses included, and the `to` of
        rules. Raises: OSError, DecodeError.
        """
        async with Requests(NETLINK_ROUTE) as requests:
            return await self._prefixes(requests)

    async def resolve(self) -> tuple[Source, ...]:
        """Return the sources now. Raises: OSError, DecodeError."""
        return (await self._resolve()).sources

    async def _resolve(self) -> SourcesResolved:
        sources: list[Source] = []
        links: list[tuple[Network, int]] = []
        async with Requests(NETLINK_ROUTE) as requests:
            pieces = partition(self._destinations, await self._prefixes(requests))
            for count, (piece, address) in enumerate(pieces, start=1):
                source, link = _route(requests, address)
                sources.append((piece, source))
                links.append((piece, link))
                if count % BATCH == 0:
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
                    found.update(await requests.dump(partial(encode, family), self._inside))
                except OSError as error:
                    if error.errno != errno.EAFNOSUPPORT:
                        raise
                    # A kernel without IPv6, or whose module is not loaded: nothing routes it.
        return {network(one) for one in found}

    def _inside(self, datagram: bytes) -> list[Prefix]:
        return [one for one in decode_prefixes(datagram) if self._cover.contains(one)]

    async def _tell(self) -> None:
        before = self._closed
        resolved = await self._resolve()
        if self._closed != before:  # asked too early, perhaps; the next look is due
            resolved = replace(resolved, into_tun=())
        if resolved != self._last:
            self._last = resolved
            self._deliver(resolved)

    def _close(self, lost: Iterable[tuple[int, Prefix | None]]) -> None:
        """Tell at once which tunnels lost their route."""
        gone = []
        for link, where in lost:
            if where is None or self._cover.touches(where):
                self._closed += 1  # and what is being asked just now is out of date
                if link in self._tuns:
                    gone.append(where)
        if not gone or self._last is None:
            return
        away = PrefixSet(network(where) for where in gone if where is not None)
        into_tun = tuple(
            (one, into and None not in gone and not away.touches(prefix(one)))
            for one, into in self._last.into_tun
        )
        if into_tun != self._last.into_tun:
            self._last = replace(self._last, into_tun=into_tun)
            self._deliver(self._last)

    def _on_change(self, datagram: bytes) -> None:
        try:
            self._close(decode_lost(datagram))
            if only_routes(datagram) and not any(
                self._cover.touches(one) for one in decode_prefixes(datagram)
            ):
                return
        except DecodeError:
            pass  # a change all the same
        self._due.set()


def _route(requests: Requests, address: Address) -> tuple[Address | None, int]:
    """Return a destination's source and link; None and 0: it can't be reached."""
    try:
        found = requests.ask(partial(encode_route_get, address), decode_route)
    except OSError:
        return None, 0  # whatever the reason, the kernel would not send there either
    return found[0] if found else (None, 0)


def _is_tun(requests: Requests, link: int) -> bool:
    try:
        found = requests.ask(partial(encode_link_get, link), decode_link)
    except OSError:
        return False  # it went meanwhile, or there was none
    return any(kind == "tun" and name.startswith(TUN) for name, kind in found)
