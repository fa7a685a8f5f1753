"""Which changes of the gate's own namespace concern the paths of another: `edges.kernel.here`."""

from __future__ import annotations

import struct
from dataclasses import replace
from ipaddress import ip_interface, ip_network

import pytest

from ipsecgate.core.model.namespace import DeviceAddress, Link
from ipsecgate.core.model.nat import BaseChain, Hook, Ruleset
from ipsecgate.core.model.prefixes import PrefixSet
from ipsecgate.core.nat.translation import Nat
from ipsecgate.edges.kernel.here import Here, concerns
from tests.unit import xfrm_bytes as raw

BRIDGE, MINE, OTHERS, WIRE = 1, 2, 3, 4
USED = (BRIDGE, MINE, WIRE)
LINKS = {
    BRIDGE: Link(BRIDGE, "cni0", "bridge"),
    MINE: Link(MINE, "veth1", "veth", 2, 0, BRIDGE),
    OTHERS: Link(OTHERS, "veth2", "veth", 2, 1, BRIDGE),
    WIRE: Link(WIRE, "eth0", ""),
}


def held(link: int, interface: str) -> DeviceAddress:
    made = ip_interface(interface)
    return DeviceAddress(link, made.ip, made.network)


HERE = Here(LINKS, frozenset(), (held(WIRE, "192.0.2.1/24"),), frozenset(), Nat(Ruleset()))
CHAIN = BaseChain((2, "nat"), "POSTROUTING", Hook.POSTROUTING, 100, nat=True)


def test_what_concerns_another_containers_link_makes_no_difference() -> None:
    without = {index: link for index, link in LINKS.items() if index != OTHERS}
    automatic = held(OTHERS, "fe80::7/64")
    for other in (
        HERE,
        replace(HERE, links=without),
        replace(HERE, links={**LINKS, OTHERS: replace(LINKS[OTHERS], is_up=False)}),
        replace(HERE, ingress=frozenset({OTHERS})),
        replace(HERE, addresses=(*HERE.addresses, automatic)),
        replace(HERE, nat=Nat(Ruleset())),
    ):
        assert not HERE.differs(other, USED)


@pytest.mark.parametrize(
    "other",
    [
        replace(HERE, links={**LINKS, MINE: replace(LINKS[MINE], master=0)}),
        replace(HERE, links={**LINKS, WIRE: replace(LINKS[WIRE], is_up=False)}),
        replace(HERE, ingress=frozenset({BRIDGE})),
        replace(HERE, addresses=(*HERE.addresses, held(BRIDGE, "10.88.0.1/24"))),
        replace(HERE, addresses=(*HERE.addresses, held(BRIDGE, "fe80::1/64"))),
        replace(HERE, prefixes=frozenset({(4, 0, 0)})),
        replace(HERE, nat=Nat(Ruleset((CHAIN,)))),
        replace(HERE, nat=None),
    ],
)
def test_what_its_packets_pass_makes_a_difference(other: Here) -> None:
    assert HERE.differs(other, USED)
    assert other.differs(HERE, USED)


FOLLOWED = PrefixSet([ip_network("203.0.113.0/24")])


def about(kind: int, network: str) -> bytes:
    made = ip_network(network)
    body = struct.pack("=BBBBBBBBI", 2, made.prefixlen, 0, 0, 254, 0, 0, 1, 0)
    return raw.message(kind, body + raw.attribute(1, made.network_address.packed))


@pytest.mark.parametrize(
    ("datagram", "does"),
    [
        (about(24, "203.0.113.64/26"), True),
        (about(25, "0.0.0.0/0"), True),
        (about(24, "10.88.0.7/32"), False),
        (about(32, "10.88.0.7/32"), True),  # a rule
        (raw.message(16, bytes(16)), False),  # a link: that is compared
        (b"\1", True),
    ],
)
def test_routes_to_other_networks_concern_nobody(datagram: bytes, does: bool) -> None:
    assert concerns(datagram, FOLLOWED) is does
