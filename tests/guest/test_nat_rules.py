"""The evaluator of NAT rules against this kernel's nftables, which the test kernel lacks."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.system.nat_oracle import World, leaves_as_predicted

PROBE = ["unshare", "--net", "nft", "add table ip probe"]
LACKS = os.geteuid() != 0 or subprocess.run(PROBE, capture_output=True, check=False).returncode != 0
pytestmark = pytest.mark.skipif(LACKS, reason="missing: root, nft, or a kernel with nftables")


@pytest.fixture
def world() -> Iterator[World]:
    world = World(f"nat-{os.getpid()}")
    yield world
    world.remove()


@pytest.mark.parametrize("unclear", [False, True])
@pytest.mark.parametrize("kind", ["nft", "iptables-nft"])
def test_real_packets_leave_as_predicted(world: World, kind: str, unclear: bool) -> None:
    leaves_as_predicted(world, kind, unclear=unclear)
