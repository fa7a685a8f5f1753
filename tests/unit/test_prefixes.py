"""Which destinations to query for a route, compared with the definition over random networks."""

from __future__ import annotations

import time
from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Network, collapse_addresses, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipsecgate.core.model.flow import Address, FlowPath, Network
from ipsecgate.core.model.prefixes import (
    SPECIAL,
    LongestPrefix,
    PrefixSet,
    as_prefix,
    compress,
    in_words,
    limit_paths,
    partition,
)


def nets(*texts: str) -> list[Network]:
    return [ip_network(text) for text in texts]


def asked(protected: list[Network], prefixes: list[Network]) -> dict[str, str]:
    return {str(net): str(address) for net, address in partition(protected, prefixes)}


def test_a_protected_network_is_one_query() -> None:
    wide = nets("0.0.0.0/0", "10.0.0.0/8", "192.0.2.0/24", "::/0")
    assert asked(nets("10.2.0.0/16", "2001:db8::/32"), wide) == {
        "10.2.0.0/16": "10.2.0.0",
        "2001:db8::/32": "2001:db8::",
    }


def test_a_route_inside_a_protected_network_is_a_query_of_its_own() -> None:
    assert asked(nets("10.2.0.0/16"), nets("10.2.0.0/24", "10.2.7.0/24", "10.2.0.0/16")) == {
        "10.2.0.0/16": "10.2.1.0",
        "10.2.0.0/24": "10.2.0.0",
        "10.2.7.0/24": "10.2.7.0",
    }


def test_a_network_fully_covered_by_smaller_ones_is_left_out() -> None:
    assert asked(nets("10.2.0.0/24"), nets("10.2.0.0/25", "10.2.0.128/26", "10.2.0.192/26")) == {
        "10.2.0.0/25": "10.2.0.0",
        "10.2.0.128/26": "10.2.0.128",
        "10.2.0.192/26": "10.2.0.192",
    }


def test_a_single_host_is_one_query() -> None:
    assert asked(nets("192.0.2.2/32"), nets("192.0.2.0/24")) == {"192.0.2.2/32": "192.0.2.2"}
    assert asked([], nets("10.0.0.0/8")) == {}


def test_a_default_network_is_not_queried_at_a_special_address() -> None:
    assert asked(nets("0.0.0.0/0", "::/0"), nets("127.0.0.0/8")) == {
        "0.0.0.0/0": "1.0.0.0",
        "127.0.0.0/8": "127.0.0.0",
        "::/0": "::2",
    }


def test_a_special_network_is_queried_at_its_own_addresses() -> None:
    assert asked(nets("224.0.0.0/4", "ff02::/16"), []) == {
        "224.0.0.0/4": "224.0.0.0",
        "ff02::/16": "ff02::",
    }
    assert asked(nets("126.0.0.0/7"), nets("126.0.0.0/8"))["126.0.0.0/7"] == "127.0.0.0"


V4 = st.builds(
    lambda low, bits: ip_network((0x7EFFFF80 + low, bits), strict=False),
    st.integers(0, 255),
    st.integers(20, 32),
)
V6 = st.builds(
    lambda low, bits: (
        ip_network((ip_address("2001:db8::").packed, 0), strict=False)
        if bits == 0
        else IPv6Network((int(ip_address("2001:db8::")) + low, bits), strict=False)
    ),
    st.integers(0, 63),
    st.one_of(st.just(0), st.integers(120, 128)),
)
NETWORKS = st.lists(st.one_of(V4, V6), max_size=12)


@given(NETWORKS, NETWORKS)
def test_the_partition_matches_its_definition(
    protected: list[Network], prefixes: list[Network]
) -> None:
    expected = set(protected) | {
        one for one in prefixes if any(inside(one, other) for other in protected)
    }
    found = partition(protected, prefixes)
    addresses = dict(found)
    assert len(addresses) == len(found)
    assert addresses.keys() <= expected
    for net in expected:
        smaller = [one for one in expected if one != net and inside(one, net)]
        left = net.num_addresses - size(smaller)
        assert (net in addresses) == (left > 0)
        if left:
            address = addresses[net]
            assert address in net
            assert not any(address in one for one in smaller)
            special = [one for one in SPECIAL if one != net and inside(one, net)]
            if any(address in one for one in special):
                assert size(smaller + special) == net.num_addresses


def inside(inner: Network, outer: Network) -> bool:
    return inner.version == outer.version and inner.subnet_of(outer)  # type: ignore[arg-type]


def size(networks: list[Network]) -> int:
    """Count the addresses in the union of these networks of one family."""
    whole: Iterable[Network] = collapse_addresses(networks)  # type: ignore[type-var]
    return sum(one.num_addresses for one in whole)


@given(st.dictionaries(st.one_of(V4, V6), st.sampled_from([*"abc", None]), max_size=12), V4, V6)
def test_compression_changes_no_lookup_and_keeps_nothing_redundant(
    table: dict[Network, str | None], four: IPv4Network, six: IPv6Network
) -> None:
    sources = {"a": ip_address("192.0.2.1"), "b": ip_address("192.0.2.2"), "c": ip_address("::c")}
    full = {net: sources[name] if name else None for net, name in table.items()}
    small = dict(compress(full.items()))
    assert small.items() <= full.items()
    for address in {*four, *six} if six.prefixlen else {*four}:
        assert lookup(small, address) == lookup(full, address)
    for net in small:
        without = {other: source for other, source in small.items() if other != net}
        assert lookup(without, net.network_address) != lookup(small, net.network_address) or any(
            other.network_address == net.network_address for other in without
        )


def lookup(table: dict[Network, Address | None], address: Address) -> tuple[bool, Address | None]:
    """Return whether any network contains the address, and the source of the longest."""
    nets_ = [net for net in table if address in net]
    return (True, table[max(nets_, key=lambda net: net.prefixlen)]) if nets_ else (False, None)


@given(NETWORKS, st.one_of(V4, V6))
def test_a_prefix_set_contains_and_touches_as_defined(
    networks: list[Network], one: Network
) -> None:
    cover = PrefixSet(networks)
    assert cover.contains(as_prefix(one)) == any(inside(one, other) for other in networks)
    assert cover.overlaps(as_prefix(one)) == any(
        inside(one, other) or inside(other, one) for other in networks
    )


@pytest.mark.parametrize("protected", ["10.0.0.0/8", "0.0.0.0/0"])
def test_a_hundred_thousand_routes_take_seconds(protected: str) -> None:
    """Nested routes; a quadratic algorithm would take hours."""
    routes: list[Network] = [IPv4Network((0x0A000000 + 256 * i, 24)) for i in range(50_000)]
    routes += [IPv4Network((0x0A000000 + 256 * i, 25)) for i in range(50_000)]
    began = time.process_time()
    assert len(partition(nets(protected), routes)) == 100_001
    assert time.process_time() - began < 20


@st.composite
def networks(draw: st.DrawFn) -> Network:
    bits = draw(st.integers(24, 32))
    return ip_network((0x0A000000 | draw(st.integers(0, 255)) >> 32 - bits << 32 - bits, bits))


LEFT, RIGHT = ip_address("10.0.0.1"), ip_address("10.0.0.2")


PATHS = tuple(map(FlowPath, (LEFT, RIGHT, None)))


def looked_up(paths: Iterable[tuple[Network, FlowPath]], address: Address) -> object:
    return next(LongestPrefix(paths).containing(address), (None, FlowPath(None)))[1]


@given(st.lists(st.tuples(networks(), st.sampled_from(PATHS)), max_size=12),
       st.lists(networks(), min_size=1, max_size=5), st.integers(1, 8))  # fmt: skip
def test_destinations_that_do_not_fit_become_unknown_and_nothing_else_changes(
    found: list[tuple[Network, FlowPath]], destinations: list[Network], limit: int
) -> None:
    cover = PrefixSet(destinations)
    paths = [(one, path) for one, path in dict(found).items() if cover.contains(as_prefix(one))]
    fitted, lost = limit_paths(paths, destinations, limit)
    assert len(fitted) <= limit
    for one in (*destinations, *(one for one, _ in paths)):
        for address in (one[0], one[-1]):
            now = looked_up(fitted, address)
            if any(address in gone for gone in lost):
                assert now in (FlowPath(None), looked_up(paths, address))
            else:
                assert now == looked_up(paths, address)


def test_the_most_fragmented_destination_is_dropped_first() -> None:
    busy, calm = ip_network("10.1.0.0/16"), ip_network("10.1.128.0/17")
    pieces = [(ip_network((int(busy[0]) + n, 32)), FlowPath(RIGHT)) for n in range(1, 20)]
    fitted, lost = limit_paths([(busy, FlowPath(LEFT)), *pieces], [busy, calm], 10)
    assert lost == [busy]
    assert looked_up(fitted, ip_address("10.1.0.1")) == FlowPath(None)
    assert looked_up(fitted, ip_address("10.1.200.1")) == FlowPath(LEFT)


@pytest.mark.parametrize(
    ("around", "holes", "words"),
    [
        ("10.2.0.0/16", ["10.2.0.53/32"], ["10.2.0.0/16 except 10.2.0.53/32"]),
        ("10.2.0.0/16", [], ["10.2.0.0/16"]),
        ("2001:db8::/32", ["2001:db8::1/128"], ["2001:db8::/32 except 2001:db8::1/128"]),
        ("10.2.0.0/24", ["10.2.0.128/25"], ["10.2.0.0/25"]),
        ("10.0.0.0/30", ["10.0.0.1/32"], ["10.0.0.0/32", "10.0.0.2/31"]),
    ],
)
def test_networks_in_words(around: str, holes: list[str], words: list[str]) -> None:
    parts = [ip_network(around)]
    for hole in map(ip_network, holes):
        parts = [
            rest
            for net in parts
            for rest in (net.address_exclude(hole) if hole.subnet_of(net) else [net])  # type: ignore[arg-type]
        ]
    assert in_words(parts) == words
    far = ip_network("192.0.2.0/24")
    assert in_words([far, *parts]) == ([*words, str(far)] if "." in around else [str(far), *words])


@given(st.sets(st.integers(0, 63), min_size=1))
def test_networks_in_words_are_the_same_addresses(numbers: set[int]) -> None:
    """Each address is in what the words name, less what they leave out, and no other one is."""
    words = in_words(ip_network((10 << 24 | number, 32)) for number in numbers)
    named: set[int] = set()
    for text in words:
        net, _, holes = text.partition(" except ")
        found = {int(address) for address in ip_network(net)}
        for hole in holes.split(", ") if holes else ():
            found -= {int(address) for address in ip_network(hole)}
        assert not named & found
        named |= found
    assert named == {10 << 24 | number for number in numbers}
