"""Which destinations must be asked about, to know the source address of every unbound flow.

The kernel chooses the source of an unbound socket by the most specific route, so within a
protected network the answer can change only where a route or rule begins. Asking once for each
such piece, at an address that is in no smaller piece, gives a longest-prefix table that agrees
with the kernel everywhere.

Rules of this module: networks are (version, first address, bits) inside, because a table of
routes can be long; everything is one sort and one sweep. Sorted like that, a network comes
right before the networks inside it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import TypeVar

from ipsecgate.core.flow import Address, Network

Prefix = tuple[int, int, int]
Source = tuple[Network, Address | None]
T = TypeVar("T")

WIDTH = {4: 32, 6: 128}

# Asking about these says nothing about the network around them: "this host", loopback, multicast,
# broadcast; and what can't be asked about without naming an interface.
SPECIAL: tuple[Network, ...] = tuple(
    ip_network(text)
    for text in (
        *("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/3"),
        *("::/127", "::ffff:0:0/96", "fe80::/10", "ff00::/8"),
    )
)


def prefix(network: Network) -> Prefix:
    """Return a network as this module sorts it."""
    return network.version, int(network.network_address), network.prefixlen


def network(one: Prefix) -> Network:
    """Return the network of a prefix."""
    version, first, bits = one
    return IPv4Network((first, bits)) if version == 4 else IPv6Network((first, bits))


class Cover:
    """A set of networks that can be asked quickly about others."""

    def __init__(self, networks: Iterable[Network]) -> None:
        self._first: dict[int, list[int]] = {4: [], 6: []}
        self._last: dict[int, list[int]] = {4: [], 6: []}
        for one in sorted(map(prefix, networks)):
            version, first, _bits = one
            last = _last(one)
            if not self._last[version] or self._last[version][-1] < last:
                self._first[version].append(first)
                self._last[version].append(last)

    def contains(self, one: Prefix) -> bool:
        """Tell whether a network lies within one of these, or is one."""
        version, first, _bits = one
        at = bisect_right(self._first[version], first) - 1
        return at >= 0 and _last(one) <= self._last[version][at]

    def touches(self, one: Prefix) -> bool:
        """Tell whether a network has an address in common with one of these."""
        version, first, _bits = one
        at = bisect_right(self._first[version], _last(one)) - 1
        return at >= 0 and first <= self._last[version][at]


def partition(
    protected: Iterable[Network], prefixes: Iterable[Network]
) -> list[tuple[Network, Address]]:
    """Return the networks to ask about, each with an address to ask with.

    The networks are the protected ones and the prefixes inside one of them; the address is in
    no smaller one of the list. A network that smaller ones cover completely is left out: no
    address of it is looked up there. Addresses that say little (`SPECIAL`) are taken only where
    there are no others.
    """
    wanted = list(protected)
    cover = Cover(wanted)
    asked = {prefix(one) for one in wanted}
    asked.update(one for one in map(prefix, prefixes) if cover.contains(one))
    free = _free(asked)
    better = _free(asked.union(map(prefix, SPECIAL)))
    return [
        (network(one), _address(one[0], better.get(one, free[one])))
        for one in sorted(asked)
        if one in free
    ]


def compress(sources: Iterable[tuple[Network, T]]) -> tuple[tuple[Network, T], ...]:
    """Leave out the networks that have the source, or whatever it is, of the network around them.

    A longest-prefix lookup gives the same answers before and after.
    """
    found: list[tuple[Network, T]] = []
    around: list[tuple[Network, T]] = []
    for network_, source in sorted(sources, key=lambda item: prefix(item[0])):
        while around and not _inside(network_, around[-1][0]):
            around.pop()
        if not around or around[-1][1] != source:
            found.append((network_, source))
            around.append((network_, source))
    return tuple(found)


def _free(prefixes: Iterable[Prefix]) -> dict[Prefix, int]:
    """Return the first address of each network that no smaller network has, where there is one."""
    found: dict[Prefix, int] = {}
    open_: list[tuple[Prefix, int]] = []  # networks around the sweep, with the next address to try

    def close(one: Prefix, candidate: int) -> None:
        if candidate <= _last(one):
            found.setdefault(one, candidate)

    for one in sorted(prefixes):
        version, first, _bits = one
        while open_ and (open_[-1][0][0] != version or _last(open_[-1][0]) < first):
            close(*open_.pop())
        if open_:
            around, candidate = open_[-1]
            if candidate < first:
                found.setdefault(around, candidate)
            open_[-1] = around, _last(one) + 1
        open_.append((one, first))
    while open_:
        close(*open_.pop())
    return found


def _last(one: Prefix) -> int:
    version, first, bits = one
    return first + (1 << WIDTH[version] - bits) - 1


def _inside(inner: Network, outer: Network) -> bool:
    one, other = prefix(inner), prefix(outer)
    return one[0] == other[0] and other[1] <= one[1] and _last(one) <= _last(other)


def _address(version: int, number: int) -> Address:
    return IPv4Address(number) if version == 4 else IPv6Address(number)
