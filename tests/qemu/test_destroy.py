"""`live_flows = "destroy"` on a kernel that can end sockets, which the everyday one cannot.

The application learns at once that its SA is gone; one whose SA is replaced learns nothing, and
neither does a process that is not gated. What they learn is their system calls' word, what left
the capture's, when the SA went the kernel's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab
from ipsecgate.lab.xfrm_watch import XfrmWatch
from tests.chaos.voice import Voice
from tests.chaos.world import SPEAKER
from tests.system.conftest import cache
from tests.system.strongswan import vici
from tests.until import wait_until

__all__ = ["cache"]

PORT = 7500
AT_ONCE = 3.0  # seconds, on an emulated machine; TCP itself would try for a quarter of an hour
PIPE = subprocess.PIPE
STANDER = Path(__file__).with_name("stander.py")
FINE = {"tcp": "", "udp": ""}

pytestmark = pytest.mark.skipif(
    "User Mode Linux" in Path("/proc/cpuinfo").read_text(),
    reason="missing: INET_DIAG_DESTROY in user-mode-linux",
)


class Stander:
    """A process whose sockets stand, gated or not."""

    def __init__(self, lab: Lab, to: object, cgroup: Path | None) -> None:
        argv = [sys.executable, "-S", "-I", str(STANDER), str(to), str(PORT)]
        self._process = lab.a.popen(argv, cgroup=cgroup, stdin=PIPE, stdout=PIPE)
        assert self.hear() == "ready"

    def hear(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def echo(self) -> dict[str, str]:
        """Have both sockets used. Raises: AssertionError if one failed before."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        told = self.hear()
        assert isinstance(told, dict), told
        return told


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-destroy") as lab:
        lab.warm_up(("tunnel",), (4,))
        lab.warm_up(("transport",), (6,))
        Voice(lab.b, [sys.executable, "-S", "-I", str(SPEAKER), "server", str(PORT)])
        yield lab


@pytest.fixture(scope="module")
def gate(lab: Lab, cache: Path) -> Iterator[Gated]:
    with Gated(lab, policies='live_flows = "destroy"\n', cache=cache) as gate:
        yield gate


def deleted(watch: XfrmWatch) -> list[float]:
    """Return when outbound SAs went."""
    return [event.time for event in watch.events() if event.name == "DELSA" and event.outbound]


def connected(lab: Lab, spec: ConnSpec, gate: Gated) -> bool:
    told = lab.a.client("tcp-client", lab.b.address(spec), PORT, cgroup=gate.cgroup).result()
    return told["error"] is None and told["echoed"]


# Without a trap nothing of strongSwan's is in the way of what a socket that is ended still sends.
@pytest.mark.parametrize(
    ("mode", "family", "start_action", "side"),
    [("tunnel", 4, "none", "a"), ("transport", 6, "trap", "b")],
)
def test_who_stands_without_an_sa_is_told_at_once(
    lab: Lab, gate: Gated, mode: str, family: int, start_action: str, side: str
) -> None:
    lab.reset()
    spec = ConnSpec(f"{mode}-{family}", mode, family, start_action=start_action)
    lab.load(spec)
    gate.wait_policy(spec.name)
    with lab.watch() as watch, lab.capture() as capture:
        assert connected(lab, spec, gate), gate.log.read_text()
        gated = Stander(lab, lab.b.address(spec), gate.cgroup)
        other = Stander(lab, lab.b.address(spec), None)

        lab.a.charon.rekey(spec.child_name)
        wait_until(lambda: len(deleted(watch)) == 1, "not rekeyed")
        assert gated.echo() == other.echo() == FINE, "made before it was broken"

        vici(lab.a if side == "a" else lab.b, "terminate", child=spec.child_name)
        told = {name: (error, when) for name, error, when in (gated.hear(), gated.hear())}
        assert {name: error for name, (error, _) in told.items()} == {
            "tcp": "ECONNABORTED",
            "udp": "ECONNABORTED",
        }
        wait_until(lambda: len(deleted(watch)) == 2, "not deleted")
        assert max(when for _, when in told.values()) - deleted(watch)[1] < AT_ONCE
        assert gated.echo() == {"tcp": "EPIPE", "udp": "EDESTADDRREQ"}

        assert connected(lab, spec, gate), "it begins anew"
        assert other.echo() == FINE, "nobody touched a process that is not gated"
        seen = capture.stop()
    assert seen.esp
    assert not seen.clear
