"""`live_flows = "destroy"` on a kernel that can destroy sockets, unlike user-mode-linux.

A gated application gets an error as soon as its SA is gone. If the SA is replaced, or the process
is not gated, nothing happens. The evidence: system calls for the errors, the capture for packets,
the kernel's events for the time when the SA went.
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
from ipsecgate.lab.recorder import Recorder
from tests.chaos.reporter import Reporter
from tests.chaos.world import SENDER
from tests.system.conftest import cache
from tests.system.strongswan import vici
from tests.until import wait_until

__all__ = ["cache"]

PORT = 7500
SOON = 3.0  # seconds, on an emulated machine; TCP itself would retry for a quarter of an hour
PIPE = subprocess.PIPE
PROCESS = Path(__file__).with_name("open_sockets.py")
FINE = {"tcp": "", "udp": ""}

pytestmark = pytest.mark.skipif(
    "User Mode Linux" in Path("/proc/cpuinfo").read_text(),
    reason="missing: INET_DIAG_DESTROY in user-mode-linux",
)


class OpenSockets:
    """A process with open sockets, gated or not."""

    def __init__(self, lab: Lab, to: object, cgroup: Path | None) -> None:
        argv = [sys.executable, "-S", "-I", str(PROCESS), str(to), str(PORT)]
        self._process = lab.a.popen(argv, cgroup=cgroup, stdin=PIPE, stdout=PIPE)
        assert self.next_report() == "ready"

    def next_report(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def echo(self) -> dict[str, str]:
        """Use both sockets; return their errors. Raises: AssertionError if one failed before."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        errors = self.next_report()
        assert isinstance(errors, dict), errors
        return errors


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-destroy") as lab:
        lab.warm_up(("tunnel",), (4,))
        lab.warm_up(("transport",), (6,))
        Reporter(lab.b, [sys.executable, "-S", "-I", str(SENDER), "server", str(PORT)])
        yield lab


@pytest.fixture(scope="module")
def gate(lab: Lab, cache: Path) -> Iterator[Gated]:
    with Gated(lab, policies='live_flows = "destroy"\n', cache=cache) as gate:
        yield gate


def deleted(recorder: Recorder) -> list[float]:
    """Return the times at which outbound SAs were deleted."""
    return [event.time for event in recorder.events() if event.name == "DELSA" and event.outbound]


def connected(lab: Lab, spec: ConnSpec, gate: Gated) -> bool:
    report = lab.a.client("tcp-client", lab.b.address(spec), PORT, cgroup=gate.cgroup).result()
    return report["error"] is None and report["echoed"]


# Without a trap no strongSwan policy blocks the packets that a destroyed socket still sends.
@pytest.mark.parametrize(
    ("mode", "family", "start_action", "side"),
    [("tunnel", 4, "none", "a"), ("transport", 6, "trap", "b")],
)
def test_a_flow_without_an_sa_is_destroyed_promptly(
    lab: Lab, gate: Gated, mode: str, family: int, start_action: str, side: str
) -> None:
    lab.reset()
    spec = ConnSpec(f"{mode}-{family}", mode, family, start_action=start_action)
    lab.load(spec)
    gate.wait_policy(spec.name)
    with lab.record() as recorder, lab.capture() as capture:
        assert connected(lab, spec, gate), gate.log.read_text()
        gated = OpenSockets(lab, lab.b.address(spec), gate.cgroup)
        other = OpenSockets(lab, lab.b.address(spec), None)

        lab.a.charon.rekey(spec.child_name)
        wait_until(lambda: len(deleted(recorder)) == 1, "not rekeyed")
        assert gated.echo() == other.echo() == FINE, "the new SA came before the old one went"

        vici(lab.a if side == "a" else lab.b, "terminate", child=spec.child_name)
        reports = [gated.next_report(), gated.next_report()]
        ends = {name: (error, when) for name, error, when in reports}
        assert {name: error for name, (error, _) in ends.items()} == {
            "tcp": "ECONNABORTED",
            "udp": "ECONNABORTED",
        }
        wait_until(lambda: len(deleted(recorder)) == 2, "not deleted")
        assert max(when for _, when in ends.values()) - deleted(recorder)[1] < SOON
        assert gated.echo() == {"tcp": "EPIPE", "udp": "EDESTADDRREQ"}

        assert connected(lab, spec, gate), "a new connection works"
        assert other.echo() == FINE, "a process that is not gated keeps its sockets"
        seen = capture.stop()
    assert seen.esp
    assert not seen.clear
