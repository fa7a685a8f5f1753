"""The evaluator of NAT rules against the kernel: random rules of iptables-legacy, and real packets.

user-mode-linux has no nftables for IP; tests/guest/test_nat_rules.py compares those.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.system.nat_oracle import World, leaves_as_predicted

pytestmark = pytest.mark.second_guest


@pytest.fixture
def world(unique: str) -> Iterator[World]:
    world = World(unique)
    yield world
    world.remove()


@pytest.mark.parametrize("unclear", [False, True])
def test_real_packets_leave_as_predicted(world: World, unclear: bool) -> None:
    leaves_as_predicted(world, "iptables-legacy", unclear=unclear)
