"""A hub: the short form of `make hub`, see `tests.hub`. HUB_SEED chooses another run.

The second test checks the check: a gate that opens for a moment must be caught.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from ipsecgate.admin import loader
from ipsecgate.edges.kernel.probe import has_esp
from tests.hub.run import PERIOD, Size, run
from tests.hub.world import build_hub
from tests.until import wait_until

pytestmark = [
    pytest.mark.second_guest,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing: root"),
    pytest.mark.skipif(not has_esp(), reason="missing: ESP in the kernel"),
]

SEED = int(os.environ.get("HUB_SEED", "1"))
SIZE = Size(sites=40, warriors=40, up=8, down=4, changes=10, deletions=3, kills=1)


def test_nothing_leaks_and_nothing_covered_is_refused(cache: Path) -> None:
    evidence = run(cache, SEED, SIZE, sys.stdout)
    assert evidence.attempts > 1000
    assert evidence.streams == SIZE.up // 2


def test_a_leak_is_detected(cache: Path) -> None:
    with build_hub(cache, SEED, 1, 1, "ipsecgate-test-hub") as hub:
        up, down = hub.tunnels[:1], hub.tunnels[1:]  # the kernel has no policy for the second
        hub.add_peers(up)
        hub.load(hub.tunnels)
        hub.wait_known(2)
        hub.start(up, down, PERIOD)
        began = time.monotonic()

        def is_let_go() -> bool:
            reports = zip(hub.sender.ask(), hub.tunnel_of, strict=True)
            return all(report["good"] > began for report, tunnel in reports if tunnel in down)

        loader.detach(hub.gate.paths, str(hub.gate.cgroup))
        wait_until(is_let_go, "no call to an uncovered target succeeded")
        loader.attach(hub.gate.paths, str(hub.gate.cgroup))
        hub.judge()
        assert hub.evidence.let_go
        assert hub.evidence.leaked
        with pytest.raises(AssertionError, match="packets in clear"):
            hub.evidence.check()
