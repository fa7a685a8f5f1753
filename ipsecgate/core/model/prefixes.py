"""Longest-prefix tables, and which destinations to query to build one that agrees with the kernel.

The kernel chooses the source address of an unbound socket by the most specific route. Within a
protected network the choice can therefore change only where a route or a rule begins, and for IPv6
where `source_selection` says. One query for each such network, at an address that no smaller
network contains, gives a longest-prefix table that agrees with the kernel everywhere.

Rules of this module: a table of routes can be long, so networks are plain tuples here (`Prefix`),
and each algorithm is one sort and one sweep. In that order a network comes right before the
networks inside it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_network,
    summarize_address_range,
)
from typing import Generic, TypeVar

from ipsecgate.core.model.flow import Address, FlowPath, Network

Prefix = tuple[int, int, int]
"""IP version, first address as an integer, prefix length."""
Route = tuple[Network, FlowPath]
"""A destination network, and where routing leads the flows to it."""
T = TypeVar("T")

WIDTH = {4: 32, 6: 128}

# A query at one of these addresses says nothing about the network around it ("this host",
# loopback, multicast, broadcast), or needs an interface (link-local).
SPECIAL: tuple[Network, ...] = tuple(
    ip_network(text)
    for text in (
        *("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/3"),
        *("::/127", "::ffff:0:0/96", "fe80::/10", "ff00::/8"),
    )
)


def as_prefix(network: Network) -> Prefix:
    """Return a network as a `Prefix`."""
    return network.version, int(network.network_address), network.prefixlen


def as_network(prefix: Prefix) -> Network:
    """Return a `Prefix` as a network."""
    version, first, length = prefix
    return IPv4Network((first, length)) if version == 4 else IPv6Network((first, length))


def in_words(networks: Iterable[Network]) -> list[str]:
    """Return disjoint networks as short texts, such as `10.2.0.0/16 except 10.2.0.53/32`."""
    ordered = sorted(networks, key=as_prefix)
    by_version = ([net for net in ordered if net.version == version] for version in WIDTH)
    return [text for parts in by_version for text in _in_words(parts)[1]]


def _in_words(parts: list[Network]) -> tuple[int, list[str]]:
    """Return texts for networks of one version, in order, and how many networks these name."""
    if len(parts) < 2:
        return len(parts), [str(net) for net in parts]
    around = parts[0]
    while parts[-1].broadcast_address not in around:
        around = around.supernet()
    middle = next(at for at, net in enumerate(parts) if int(net[0]) >= _middle(around))
    (low, some), (high, more) = _in_words(parts[:middle]), _in_words(parts[middle:])
    holes = list(_between(around, parts))
    if 1 + len(holes) < low + high:
        but = f" except {', '.join(map(str, holes))}" if holes else ""
        return 1 + len(holes), [f"{around}{but}"]
    return low + high, [*some, *more]


def _middle(network: Network) -> int:
    return int(network.network_address) + network.num_addresses // 2


def _between(around: Network, parts: Iterable[Network]) -> Iterator[Network]:
    """Yield the networks that make up the rest of another; its parts are in order."""
    kind = type(around.network_address)
    at, end = int(around.network_address), int(around.broadcast_address) + 1
    for low, after in (*((int(net[0]), int(net[-1]) + 1) for net in parts), (end, end)):
        if at < low:
            yield from summarize_address_range(kind(at), kind(low - 1))
        at = after


class LongestPrefix(Generic[T]):
    """Values by network. A lookup costs one dictionary access for each prefix length in use."""

    def __init__(self, items: Iterable[tuple[Network, T]]) -> None:
        # By version, prefix length (longest first) and the first bits of the address.
        self._tables: dict[int, dict[int, dict[int, tuple[Network, T]]]] = {4: {}, 6: {}}
        for network, value in items:
            leading = int(network.network_address) >> network.max_prefixlen - network.prefixlen
            table = self._tables[network.version].setdefault(network.prefixlen, {})
            table[leading] = network, value
        for version, lengths in self._tables.items():
            self._tables[version] = dict(sorted(lengths.items(), reverse=True))

    def containing(
        self, address: Address, longest: int | None = None
    ) -> Iterator[tuple[Network, T]]:
        """Yield the networks that contain an address, longest prefix first.

        `longest` leaves out those with a longer prefix, so the rest contain that whole network.
        """
        number, width = int(address), address.max_prefixlen
        for length, found in self._tables[address.version].items():
            if (longest is None or length <= longest) and (number >> width - length) in found:
                yield found[number >> width - length]


class PrefixSet:
    """A set of networks; each test is one binary search."""

    def __init__(self, networks: Iterable[Network]) -> None:
        # Only the outermost networks: disjoint ranges in ascending order.
        self._first: dict[int, list[int]] = {4: [], 6: []}
        self._last: dict[int, list[int]] = {4: [], 6: []}
        for prefix in sorted(map(as_prefix, networks)):
            version, first, _length = prefix
            last = _last_address(prefix)
            if not self._last[version] or self._last[version][-1] < last:
                self._first[version].append(first)
                self._last[version].append(last)

    def contains(self, prefix: Prefix) -> bool:
        """Return whether the prefix lies within one of the networks."""
        version, first, _length = prefix
        at = bisect_right(self._first[version], first) - 1
        return at >= 0 and _last_address(prefix) <= self._last[version][at]

    def overlaps(self, prefix: Prefix) -> bool:
        """Return whether the prefix shares an address with one of the networks."""
        version, first, _length = prefix
        at = bisect_right(self._first[version], _last_address(prefix)) - 1
        return at >= 0 and first <= self._last[version][at]


def partition(
    protected: Iterable[Network], prefixes: Iterable[Network]
) -> list[tuple[Network, Address]]:
    """Return the networks to query, each with an address to query it at.

    The networks are the protected ones and those of `prefixes` that lie inside one. No smaller
    network of the list contains the address. A network that smaller ones cover completely is left
    out, because no lookup ever ends there. An address of `SPECIAL` is used only if the network
    has no other.
    """
    wanted = list(protected)
    cover = PrefixSet(wanted)
    queried = {as_prefix(network) for network in wanted}
    queried.update(prefix for prefix in map(as_prefix, prefixes) if cover.contains(prefix))
    any_address = _uncovered_addresses(queried)
    ordinary = _uncovered_addresses(queried.union(map(as_prefix, SPECIAL)))
    return [
        (as_network(prefix), _address(prefix[0], ordinary.get(prefix, any_address[prefix])))
        for prefix in sorted(queried)
        if prefix in any_address
    ]


def compress(items: Iterable[tuple[Network, T]]) -> tuple[tuple[Network, T], ...]:
    """Remove each network whose value is that of the next larger network around it.

    A longest-prefix lookup returns the same values before and after.
    """
    kept: list[tuple[Network, T]] = []
    enclosing: list[tuple[Network, T]] = []  # the kept networks around the sweep, innermost last
    for network, value in sorted(items, key=lambda item: as_prefix(item[0])):
        while enclosing and not _is_inside(network, enclosing[-1][0]):
            enclosing.pop()
        if not enclosing or enclosing[-1][1] != value:
            kept.append((network, value))
            enclosing.append((network, value))
    return tuple(kept)


def limit_paths(
    paths: Iterable[Route], destinations: Iterable[Network], limit: int
) -> tuple[tuple[Route, ...], list[Network]]:
    """Return at most `limit` paths, and the destinations whose path is unknown as a result.

    The destinations with the most pieces lose theirs first. A single piece is never left out
    alone: lookups in it would find the larger network around it, and a wrong path.
    """
    paths = tuple(paths)
    if len(paths) <= limit:
        return paths, []
    known = LongestPrefix(paths)
    destinations = tuple(destinations)
    by_destination = LongestPrefix((network, None) for network in destinations)
    pieces: dict[Network, dict[Network, FlowPath]] = {one: {} for one in destinations}
    for network, path in paths:
        around = by_destination.containing(network.network_address, network.prefixlen)
        destination = next(around, (network, None))[0]
        pieces.setdefault(destination, {})[network] = path
    for destination, own in pieces.items():
        # `compress` may have removed its own entry in favour of a larger network's.
        around_it = known.containing(destination.network_address, destination.prefixlen)
        own.setdefault(destination, next(around_it, (destination, FlowPath(None)))[1])
    lost = _collapse_largest(pieces, limit)
    found = [item for own in pieces.values() for item in own.items()]
    if len(found) <= limit:
        return tuple(found), lost
    # More destinations than the limit: leave out whole outermost networks.
    outermost: dict[Network, list[Route]] = {}
    for network, path in found:
        *_, (outer, _) = by_destination.containing(network.network_address, network.prefixlen)
        outermost.setdefault(outer, []).append((network, path))
    kept: list[Route] = []
    for outer in sorted(outermost, key=lambda network: len(outermost[network])):
        if len(kept) + len(outermost[outer]) <= limit:
            kept += outermost[outer]
        else:
            lost.append(outer)
    return tuple(kept), lost


def _collapse_largest(pieces: dict[Network, dict[Network, FlowPath]], limit: int) -> list[Network]:
    """Replace the pieces of the largest destinations by one "unknown" each; return those."""
    space, lost = limit - len(pieces), []
    for destination in sorted(pieces, key=lambda network: len(pieces[network])):
        extra = len(pieces[destination]) - 1
        if extra <= space:
            space -= extra
        else:
            pieces[destination] = {destination: FlowPath(None)}
            lost.append(destination)
    return lost


def _uncovered_addresses(prefixes: Iterable[Prefix]) -> dict[Prefix, int]:
    """Return the first address of each network that no smaller one contains, if there is one."""
    found: dict[Prefix, int] = {}
    # The networks around the sweep, each with its next address that may be uncovered.
    enclosing: list[tuple[Prefix, int]] = []

    def close(prefix: Prefix, candidate: int) -> None:
        if candidate <= _last_address(prefix):
            found.setdefault(prefix, candidate)

    for prefix in sorted(prefixes):
        version, first, _length = prefix
        while enclosing and (
            enclosing[-1][0][0] != version or _last_address(enclosing[-1][0]) < first
        ):
            close(*enclosing.pop())
        if enclosing:
            around, candidate = enclosing[-1]
            if candidate < first:
                found.setdefault(around, candidate)
            enclosing[-1] = around, _last_address(prefix) + 1
        enclosing.append((prefix, first))
    while enclosing:
        close(*enclosing.pop())
    return found


def _last_address(prefix: Prefix) -> int:
    version, first, length = prefix
    return first + (1 << WIDTH[version] - length) - 1


def _is_inside(inner: Network, outer: Network) -> bool:
    a, b = as_prefix(inner), as_prefix(outer)
    return a[0] == b[0] and b[1] <= a[1] and _last_address(a) <= _last_address(b)


def _address(version: int, number: int) -> Address:
    return IPv4Address(number) if version == 4 else IPv6Address(number)
