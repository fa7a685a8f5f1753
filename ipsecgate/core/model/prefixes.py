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
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Generic, TypeVar

from ipsecgate.core.model.flow import Address, Network

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


class LongestPrefix(Generic[T]):
    """Values by network, found by the longest prefix: one look-up for each length there is."""

    def __init__(self, items: Iterable[tuple[Network, T]]) -> None:
        self._of: dict[int, dict[int, dict[int, tuple[Network, T]]]] = {4: {}, 6: {}}
        for one, value in items:
            first = int(one.network_address) >> one.max_prefixlen - one.prefixlen
            self._of[one.version].setdefault(one.prefixlen, {})[first] = one, value
        for version, lengths in self._of.items():
            self._of[version] = dict(sorted(lengths.items(), reverse=True))

    def around(self, address: Address, bits: int | None = None) -> Iterator[tuple[Network, T]]:
        """Yield the networks that an address is in, or a network of so many bits, longest first."""
        number, width = int(address), address.max_prefixlen
        for length, found in self._of[address.version].items():
            if (bits is None or length <= bits) and (number >> width - length) in found:
                yield found[number >> width - length]


class PrefixSet:
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
    cover = PrefixSet(wanted)
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


def fit(
    sources: Iterable[Source], destinations: Iterable[Network], limit: int
) -> tuple[tuple[Source, ...], list[Network]]:
    """Return at most so many sources, and the destinations that lost some: theirs is unknown.

    Those in the most pieces come last. A piece is never left out alone: the network around it
    would answer for it, and wrongly.
    """
    sources = tuple(sources)
    if len(sources) <= limit:
        return sources, []
    known = LongestPrefix(sources)
    destinations = tuple(destinations)
    wanted = LongestPrefix((one, None) for one in destinations)
    pieces: dict[Network, dict[Network, Address | None]] = {one: {} for one in destinations}
    for one, source in sources:
        owner = next(wanted.around(one.network_address, one.prefixlen), (one, None))[0]
        pieces.setdefault(owner, {})[one] = source
    for owner, theirs in pieces.items():  # its own may have been that of the network around it
        around = next(known.around(owner.network_address, owner.prefixlen), (owner, None))[1]
        theirs.setdefault(owner, around)
    room, lost = limit - len(pieces), []
    for owner in sorted(pieces, key=lambda one: len(pieces[one])):
        room -= len(pieces[owner]) - 1
        if room < 0:
            room += len(pieces[owner]) - 1
            pieces[owner] = {owner: None}
            lost.append(owner)
    found = [item for theirs in pieces.values() for item in theirs.items()]
    if len(found) <= limit:
        return tuple(found), lost
    outer: dict[Network, list[Source]] = {}
    for one, source in found:
        *_, (outermost, _) = wanted.around(one.network_address, one.prefixlen)
        outer.setdefault(outermost, []).append((one, source))
    kept: list[Source] = []
    for owner in sorted(outer, key=lambda one: len(outer[one])):
        if len(kept) + len(outer[owner]) <= limit:
            kept += outer[owner]
        else:
            lost.append(owner)
    return tuple(kept), lost


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
