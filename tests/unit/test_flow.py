"""One end of a flow lies in a traffic selector exactly where network, protocol and port do."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from ipsecgate.core.model.flow import PORT_MASK, TCP, UDP, TrafficSelector

NETWORK = ip_network("10.2.0.0/16")
INSIDE = ip_address("10.2.0.9")


@pytest.mark.parametrize(
    ("ports", "inside", "outside"),
    [
        ((5432, 5432), {5432}, {0, 5431, 5433, PORT_MASK}),
        ((5300, 5307), {5300, 5303, 5307}, {0, 5299, 5308}),
        ((0, PORT_MASK), {0, 1, PORT_MASK}, set()),
        ((PORT_MASK, 0), set(), {0, 1, PORT_MASK}),  # OPAQUE: RFC 7296 section 3.13.1
    ],
)
def test_both_ends_of_a_port_range_belong_to_it(
    ports: tuple[int, int], inside: set[int], outside: set[int]
) -> None:
    selector = TrafficSelector(NETWORK, TCP, ports)
    assert {port for port in inside | outside if selector.contains(INSIDE, TCP, port)} == inside


@pytest.mark.parametrize(
    ("address", "proto", "expected"),
    [
        ("10.2.0.0", TCP, True),
        ("10.2.255.255", TCP, True),
        ("10.1.255.255", TCP, False),
        ("10.3.0.0", TCP, False),
        ("::1", TCP, False),
        ("10.2.0.9", UDP, False),
        ("10.2.0.9", 0, False),
    ],
)
def test_network_and_protocol_must_match(address: str, proto: int, expected: bool) -> None:
    selector = TrafficSelector(NETWORK, TCP, (80, 80))
    assert selector.contains(ip_address(address), proto, 80) is expected
    assert TrafficSelector(NETWORK).contains(ip_address(address), proto, 80) is (
        expected or proto != TCP
    )
