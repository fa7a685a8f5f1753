"""Where the packets of another namespace arrive: `core.model.namespace`."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_interface

import pytest

from ipsecgate.core.codec import forwarding, links
from ipsecgate.core.codec.netlink import messages
from ipsecgate.core.model.flow import parse_address
from ipsecgate.core.model.namespace import (
    Arrival,
    DeviceAddress,
    Devices,
    Link,
    arrival,
    masquerade_address,
)

GATE, OTHER = 3, 4  # ids of namespaces
INSIDE = Link(2, "eth0", "veth", peer=7, peer_netns=GATE)
PORT = Link(7, "veth7", "veth", peer=2, peer_netns=0)
BRIDGE = Link(9, "cni0", "bridge")


def arrives(
    link: Link | None = INSIDE,
    *,
    gate: int = GATE,
    port: Link = PORT,
    master: Link = BRIDGE,
    ingress: frozenset[int] = frozenset(),
) -> Arrival | str:
    return arrival(link, gate, {port.index: port, master.index: master}, ingress)


def test_a_veth_arrives_at_its_other_end() -> None:
    assert arrives() == Arrival(7, is_bridged=False)


def test_a_port_of_a_bridge_arrives_at_the_bridge() -> None:
    assert arrives(port=replace(PORT, master=9)) == Arrival(9, is_bridged=True)


@pytest.mark.parametrize("kind", ["macvlan", "ipvlan", "macvtap", "netkit", "tun", "sit", ""])
def test_any_other_device_leads_around_the_host(kind: str) -> None:
    found = arrives(replace(INSIDE, kind=kind))
    assert isinstance(found, str)
    assert "around this host's SPD: only an SPD in that namespace can protect it" in found


@pytest.mark.parametrize(
    "link",
    [
        replace(INSIDE, peer_netns=OTHER),
        replace(INSIDE, peer_netns=None),  # a pair within the namespace
        replace(INSIDE, peer_netns=-1),
    ],
)
def test_a_veth_into_another_namespace_leads_around_the_host(link: Link) -> None:
    assert "another namespace than the gate's" in str(arrives(link))


def test_a_namespace_that_has_no_id_for_the_gates() -> None:
    """-1 means that neither has one, not that both are the same."""
    assert isinstance(arrives(replace(INSIDE, peer_netns=-1), gate=-1), str)


@pytest.mark.parametrize("kind", ["openvswitch", "team", "vrf", ""])
def test_a_master_that_is_no_bridge_may_do_anything(kind: str) -> None:
    master = replace(BRIDGE, kind=kind, name="master0")
    found = arrives(port=replace(PORT, master=9), master=master)
    assert "master0, which may send them around this host's SPD" in str(found)


def test_a_master_that_is_gone() -> None:
    assert isinstance(arrives(port=replace(PORT, master=10)), str)


@pytest.mark.parametrize("at", [7, 9])
def test_a_filter_for_what_arrives_may_do_anything(at: int) -> None:
    bridged = replace(PORT, master=9)
    assert isinstance(arrives(port=bridged, ingress=frozenset({at})), str)
    port = replace(bridged, has_program=at == 7)
    assert isinstance(arrives(port=port, master=replace(BRIDGE, has_program=at == 9)), str)
    assert arrives(port=bridged, ingress=frozenset({8})) == Arrival(9, is_bridged=True)


def test_a_device_that_is_gone() -> None:
    assert arrives(None) == "its packets leave by a device that is gone"
    assert "is gone" in str(arrives(replace(INSIDE, peer=8)))


def test_a_question_about_a_packet() -> None:
    """As `ip route get to 203.0.113.9 from 10.88.0.5 iif 9` asks it."""
    to, source = parse_address("203.0.113.9"), parse_address("10.88.0.5")
    (message,) = messages(forwarding.encode_packet_get(to, 1, source=source, arrives=9))
    assert message.type == forwarding.GETROUTE
    assert message.data[message.start : message.start + 3] == bytes((2, 32, 32))
    attributes = {
        kind: message.data[start:end] for kind, (start, end) in message.attributes(12).items()
    }
    assert attributes == {
        forwarding.RTA_DST: to.packed,
        forwarding.RTA_SRC: source.packed,
        forwarding.RTA_IIF: (9).to_bytes(4, "little"),
    }


def test_a_question_about_a_namespace() -> None:
    (message,) = messages(links.encode_nsid_get(12, 1))
    start, end = message.attributes(4)[links.NETNSA_FD]
    assert message.data[start:end] == (12).to_bytes(4, "little")


# --- the address of MASQUERADE ------------------------------------------------------------------


def held(link: int, interface: str, **properties: bool) -> DeviceAddress:
    made = ip_interface(interface)
    return DeviceAddress(link, made.ip, made.network, **properties)


WIRE = (
    held(1, "127.0.0.1/8", is_global=False),
    held(2, "192.0.2.1/24"),
    held(2, "192.0.2.9/24", is_secondary=True),
    held(2, "198.51.100.7/24"),
    held(2, "203.0.113.5/24", is_global=False),
    held(3, "10.0.0.1/8"),
)


@pytest.mark.parametrize(
    ("link", "hop", "address"),
    [
        (2, "192.0.2.254", "192.0.2.1"),
        (2, "198.51.100.9", "198.51.100.7"),
        (2, "203.0.113.9", "192.0.2.1"),  # that address is of another scope
        (2, "9.9.9.9", "192.0.2.1"),
        (3, "9.9.9.9", "10.0.0.1"),
        (1, "9.9.9.9", None),
        (4, "9.9.9.9", None),
    ],
)
def test_masquerade_takes_an_address_near_the_next_hop(
    link: int, hop: str, address: str | None
) -> None:
    found = masquerade_address(WIRE, link, parse_address(hop))
    assert found == (None if address is None else parse_address(address))


def test_masquerade_of_ipv6_is_known_if_there_is_no_choice() -> None:
    hop, one = parse_address("2001:db8::9"), held(2, "2001:db8::1/64")
    deprecated = held(2, "2001:db8::4/64", is_usable=False)
    on_link = held(2, "fe80::1/64", is_global=False)
    assert masquerade_address((on_link, one, deprecated), 2, hop) == one.address
    assert masquerade_address((one, held(2, "2001:db8:1::1/64")), 2, hop) is None


RED, OUTSIDE = Link(20, "red", "vrf"), Link(2, "eth0", "")
INSIDE_RED = Link(21, "eth1", "", master=20)
VRF = {link.index: link for link in (RED, INSIDE_RED, OUTSIDE)}


@pytest.mark.parametrize("device", [20, 21])
@pytest.mark.parametrize(
    ("link", "own", "is_certain"),
    [
        (21, ("2001:db8::5",), True),
        (20, (), True),
        (2, ("2001:db8::1",), True),
        (2, ("2001:db8::1", "2001:db8::5"), False),
        (2, ("2001:db8::5",), False),
        (2, (), False),
    ],
)
def test_a_route_out_of_a_vrf_has_a_certain_source_only_if_the_vrf_has_it(
    device: int, link: int, own: tuple[str, ...], is_certain: bool
) -> None:
    source = parse_address("2001:db8::1")
    there = [held(20, f"{one}/64") for one in own]
    others = [
        held(2, "2001:db8::9/64"),
        held(21, "192.0.2.1/24"),
        replace(held(21, "fe80::1/64"), is_global=False),
        replace(held(21, "2001:db8::8/64"), is_usable=False),
    ]
    found = Devices(VRF, (*there, *others)).source(source, device, link)
    assert found == (source if is_certain else None)


def test_without_a_vrf_the_source_is_that_of_the_route() -> None:
    source = parse_address("2001:db8::1")
    assert Devices(VRF, ()).source(source, 2, 2) == source
    assert Devices({}, ()).source(source, 7, 2) == source
