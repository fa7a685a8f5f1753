"""How long after the deletion of a tunnel's outbound SA the gate refuses its flows.

Two hubs are compared, one of which has this tunnel alone. Their deletions take turns, because a
machine's speed changes from one minute to the next.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vici.exception import CommandException

from tests.chaos.fault_tools import vici
from tests.chaos.reporter import Reporter
from tests.hub.tunnels import Tunnel
from tests.hub.world import PORT, RECOVERY, Hub

CLOSER = Path(__file__).with_name("closer.py")
REFUSED = ("EPERM", "EHOSTUNREACH")


class Probe:
    """A tunnel of a hub, and a process there that deletes its SA and sends. `end` ends it."""

    def __init__(self, hub: Hub, tunnel: Tunnel) -> None:
        self.hub, self.tunnel = hub, tunnel
        argv = [sys.executable, "-S", "-I", str(CLOSER), str(tunnel.inside), str(PORT)]
        self._closer = Reporter(hub.lab.a, argv, hub.gate.cgroup)

    def close(self) -> tuple[float, int]:
        """Delete the outbound SA; return the seconds until a refusal, and the sends before it.

        Raises: AssertionError if the hooks do not refuse.
        """
        before = self.hub.gate.reasons()["refuse_uncovered"]
        (told,) = self._closer.ask(f"delete {self.hub.spi(self.tunnel)} {self.tunnel.peer}")
        assert told["open"], f"refused before the deletion: {told}"
        assert told["error"] in REFUSED, f"not refused: {told}"
        assert self.hub.gate.reasons()["refuse_uncovered"] > before
        return told["seconds"], told["sends"]

    def open(self) -> None:
        """Replace the IKE_SA, which does not know of the deletion; wait until sends succeed."""
        hub, name = self.hub, self.tunnel.name
        old = hub.spi(self.tunnel)
        for host in (hub.lab.a, hub.lab.b):
            vici(host, "terminate", ike=name, force="yes")
        deadline = time.monotonic() + RECOVERY
        while (new := hub.spi(self.tunnel)) in (0, old):
            if not new:
                with contextlib.suppress(CommandException):
                    hub.lab.a.charon.initiate(name)
            assert time.monotonic() < deadline, hub.diagnosis()
        (told,) = self._closer.ask("send")
        assert told["open"], f"not open again: {told}\n{hub.diagnosis()}"

    def end(self) -> None:
        """End the process."""
        self._closer.end()


@dataclass
class Closings:
    """Deletions that all ended in a refusal. `sends`: calls let go between the two."""

    name: str
    seconds: list[float] = field(default_factory=list)
    sends: int = 0

    def row(self, one: Closings) -> str:
        """Return a line of the table; the ratio to `one` is the median of the turns' ratios."""
        ratio = statistics.median(a / b for a, b in zip(self.seconds, one.seconds, strict=True))
        low, middle, _ = statistics.quantiles(self.seconds, n=4)
        late = sorted(self.seconds)[int(len(self.seconds) * 0.95)]
        figures = "".join(f"{x * 1000:>9.2f}" for x in (low, middle, late, max(self.seconds)))
        return f"{self.name:38}{len(self.seconds):>10}{figures}{self.sends:>8}{ratio:>8.2f}"


HEAD = "{:38}{:>10}{:>9}{:>9}{:>9}{:>9}{:>8}{:>8}".format(
    "SA deleted to send refused, ms",
    "deletions",
    "25 %",
    "median",
    "95 %",
    "max",
    "let go",
    "ratio",
)


def measure(probes: Sequence[Probe], names: Sequence[str], count: int) -> list[Closings]:
    """Delete each probe's outbound SA so many times, in turns."""
    found = [Closings(name) for name in names]
    for _ in range(count):
        for probe in probes:
            probe.open()
        for probe, closings in zip(probes, found, strict=True):
            seconds, sends = probe.close()
            closings.seconds.append(seconds)
            closings.sends += sends
    for probe in probes:
        probe.open()
    return found
