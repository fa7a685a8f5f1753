"""Where another IPv6 source may be chosen: `core.model.source_selection`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from random import Random

import pytest

from ipsecgate.core.model.namespace import DeviceAddress
from ipsecgate.core.model.prefixes import Prefix, as_network, as_prefix
from ipsecgate.core.model.source_selection import SCOPES, boundaries

# Those of Linux; source: ip6addrlbl_init_table.
LABELS = tuple(
    as_prefix(IPv6Network(text))
    for text in (
        *("::/0", "fc00::/7", "fec0::/10", "2002::/16", "3ffe::/16", "2001::/32", "2001:10::/28"),
        *("::ffff:0:0/96", "::/96", "::1/128"),
    )
)
OWN = ("2001:db8::", "2001:db8:8000::", "fd00::", "2002::", "fec0::")
BASES = [int(IPv6Address(text)) for text in OWN]


def held(interface: IPv6Interface) -> DeviceAddress:
    return DeviceAddress(2, interface.ip, interface.network)


def label(address: int) -> int:
    """Return the label of an address as its place in the table."""
    _, first, bits = max(
        (one for one in LABELS if IPv6Address(address) in as_network(one)), key=lambda one: one[2]
    )
    return LABELS.index((6, first, bits))


def chosen(own: Sequence[IPv6Interface], destination: int) -> IPv6Interface:
    """Return the source by rules 2, 6 and 8 of RFC 6724; the first of equals."""

    def score(one: IPv6Interface) -> tuple[bool, bool, int]:
        common = 128 - (int(one.ip) ^ destination).bit_length()
        local = one.ip.is_site_local == IPv6Address(destination).is_site_local
        return local, label(int(one.ip)) == label(destination), min(common, one.network.prefixlen)

    return max(own, key=score)


def around(prefixes: Iterable[Prefix], address: int) -> frozenset[Prefix]:
    return frozenset(one for one in prefixes if IPv6Address(address) in as_network(one))


@pytest.mark.parametrize("seed", range(20))
def test_between_two_boundaries_the_choice_is_the_same(seed: int) -> None:
    dice = Random(seed)
    own = [
        IPv6Interface((dice.choice(BASES) | dice.getrandbits(80), dice.choice((48, 64, 128))))
        for _ in range(dice.randrange(1, 7))
    ]
    found = boundaries(map(held, own), LABELS)
    choices: dict[frozenset[Prefix], IPv6Interface] = {}
    for _ in range(3000):
        near = int(dice.choice(own).ip) if dice.random() < 0.7 else dice.choice(BASES)
        destination = near ^ dice.getrandbits(dice.randrange(1, 129))
        choice = chosen(own, destination)
        assert choices.setdefault(around(found, destination), choice) == choice


def test_one_address_leaves_a_choice_only_by_scope() -> None:
    only, on_link = (held(IPv6Interface(text)) for text in ("2001:db8::1/64", "fe80::1/64"))
    version_4 = DeviceAddress(2, IPv4Address("192.0.2.1"), IPv4Network("192.0.2.0/24"))
    assert boundaries((only, on_link, version_4, only), LABELS) == SCOPES
    assert boundaries((on_link, version_4), LABELS) == set()


def test_two_addresses_differ_behind_what_they_share() -> None:
    own = [held(IPv6Interface(text)) for text in ("2001:db8:1::1/64", "2001:db8:2::1/64")]
    assert {str(as_network(one)) for one in boundaries(own, ()) - SCOPES} == {
        "2001:10::/28",
        "2001:db8::/47",
        "2001:db8:2::/47",
    }
