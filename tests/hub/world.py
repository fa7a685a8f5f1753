"""A hub with its gate, the peers that are up, a process that sends to them, and the evidence."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from vici.exception import CommandException

from ipsecgate.lab.capture import Capture
from ipsecgate.lab.frames import Kind, Packet
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.host import Host
from ipsecgate.lab.hosts import Lab
from ipsecgate.lab.recorder import Recorder
from tests.chaos.reporter import Reporter
from tests.chaos.tally import Span, kernel_gaps, widen
from tests.chaos.world import World, tail
from tests.hub.tunnels import PEERS, REMOTE, Tunnel, make_tunnels

OPEN = "192.0.2.9"  # in no connection: its packets show that the capture sees cleartext
PORT, CLOSED_PORT = 7400, 7401
KINDS = ("fresh", "kept", "tcp")
RECOVERY = 120.0  # seconds: twice the longest back-off
RETRY = 1.0  # seconds until a road warrior dials again
LOADED = 300.0  # seconds until the gate knows all connections


@dataclass
class Evidence:
    """What the senders, the capture and the kernel have shown so far."""

    attempts: int = 0
    refused: int = 0
    let_go: int = 0  # calls to a tunnel that was never up
    leaked: list[Packet] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # calls refused although covered
    esp: int = 0
    in_clear: int = 0  # to `OPEN`
    streams: int = 0  # TCP connections made
    errors: dict[str, int] = field(default_factory=dict)

    def text(self) -> str:
        """Return the figures in two lines."""
        errors = ", ".join(f"{name} {count}" for name, count in sorted(self.errors.items()))
        return (
            f"{self.attempts:,} calls, {self.refused:,} refused ({errors}); {self.streams} TCP "
            f"connections; on the wire {self.esp:,} ESP, {self.in_clear:,} in clear to the open "
            f"peer\n"
            f"in clear {len(self.leaked)}, wrongly allowed {self.let_go}, "
            f"wrongly refused {len(self.wrong)}"
        )

    def check(self) -> None:
        """Assert that nothing leaked or was wrongly refused, and that the evidence is not empty."""
        assert not self.leaked, f"{len(self.leaked)} packets in clear: {self.leaked[0]}"
        assert not self.let_go, f"{self.let_go} calls were allowed although nothing covers them"
        assert not self.wrong, f"{len(self.wrong)} wrongly refused: {self.wrong[0]}"
        assert self.esp
        assert self.in_clear
        assert self.refused


class Hub:
    """Two hosts and a gate on the first. Made by `build_hub`; `start` starts the senders."""

    sender: Reporter

    def __init__(
        self, lab: Lab, gate: Gated, recorder: Recorder, tunnels: Sequence[Tunnel]
    ) -> None:
        self.lab, self.gate, self.recorder, self.tunnels = lab, gate, recorder, tunnels
        self.up: list[Tunnel] = []
        self.targets: list[tuple[str, str, int]] = []
        self.tunnel_of: list[Tunnel | None] = []  # of each target; None: of `OPEN`
        self.evidence = Evidence()
        self.disturbed: list[Span] = []  # when refusals are excused
        self._capture: Capture | None = None
        self._dialled: dict[str, float] = {}

    # --- connections ------------------------------------------------------------------

    def load(self, tunnels: Iterable[Tunnel]) -> None:
        """Load connections at the hub, as `swanctl --load-conns` does: one after the other."""
        with self.lab.a.charon.session() as session:
            for tunnel in tunnels:
                session.load_conn(tunnel.at_hub(self.lab.a.outer[4]))

    def wait_known(self, count: int) -> None:
        """Wait until the gate knows so many connections and has published their policies."""
        deadline = time.monotonic() + LOADED
        while len(self.gate.ask()["children"]) != count:
            assert time.monotonic() < deadline, "the gate does not know the connections"
            time.sleep(0.1)

    def add_peers(self, tunnels: Iterable[Tunnel]) -> None:
        """Give host b the addresses of these peers, and load their connections there."""
        tunnels = list(tunnels)
        lines = [f"addr add {one}/32 dev eth0" for t in tunnels for one in (t.peer, t.inside)]
        batch(self.lab.b, lines)
        with self.lab.b.charon.session() as session:
            for tunnel in tunnels:
                session.load_conn(tunnel.at_peer(self.lab.a.outer[4]))

    def spi(self, tunnel: Tunnel) -> int:
        """Return the SPI of a tunnel's newest outbound SA, 0 if it has none."""
        with self.lab.a.charon.session() as session:
            found = [
                int(child["spi-out"], 16)
                for each in session.list_sas({"ike": tunnel.name})
                for sa in each.values()
                for child in sa["child-sas"].values()
                if child["state"] == b"INSTALLED"
            ]
        return found[-1] if found else 0

    def dial(self, tunnels: Iterable[Tunnel]) -> None:
        """Have the road warriors among these initiate if they have no SA, as a client would."""
        now = time.monotonic()
        for tunnel in tunnels:
            if tunnel.is_site or now < self._dialled.get(tunnel.name, -math.inf) + RETRY:
                continue
            self._dialled[tunnel.name] = now
            with self.lab.b.charon.session() as session:
                if not any(session.list_sas({"ike": tunnel.name})):
                    with contextlib.suppress(CommandException):
                        list(session.initiate({"child": tunnel.name, "timeout": "-1"}))

    # --- traffic ----------------------------------------------------------------------

    def start(self, up: Sequence[Tunnel], down: Sequence[Tunnel], period: float) -> None:
        """Send to peers that are there and to some that are not; wait until all that are answer."""
        self.up = list(up)
        for tunnel in up:
            for kind in (*KINDS, "stream") if tunnel.is_site else KINDS:
                self._target(kind, tunnel)
        for tunnel in down:
            for kind in ("fresh", "tcp"):
                self._target(kind, tunnel)
        self.targets.append(("fresh", OPEN, PORT))
        self.tunnel_of.append(None)
        argv = World.argv("sender", str(period), json.dumps(self.targets))
        self.sender = Reporter(self.lab.a, argv, self.gate.cgroup)
        self.disturbed.append((-math.inf, self.recover(self.up)))
        self.judge()

    def _target(self, kind: str, tunnel: Tunnel) -> None:
        port = CLOSED_PORT if kind == "tcp" else PORT
        self.targets.append((kind, str(tunnel.inside), port))
        self.tunnel_of.append(tunnel)

    def recover(self, tunnels: Iterable[Tunnel]) -> float:
        """Wait until everything that is sent to these tunnels works; return the time."""
        began, tunnels = time.monotonic(), set(tunnels)
        while True:
            silent = [
                (kind, tunnel)
                for report, (kind, _, _), tunnel in zip(
                    self.sender.ask(), self.targets, self.tunnel_of, strict=True
                )
                if tunnel in tunnels
                and kind != "stream"
                and not (report["good"] > began and report["bad"] < report["good"])
            ]
            now = time.monotonic()
            if not silent:
                return now
            names = sorted({tunnel.name for _, tunnel in silent if tunnel is not None})
            assert now < began + RECOVERY, f"{names} for {RECOVERY:.0f} s\n{self.diagnosis()}"
            self.dial(tunnel for _, tunnel in silent if tunnel is not None)
            time.sleep(0.05)

    def diagnosis(self) -> str:
        """Return the ends of the logs and what the gate says of its negotiations."""
        logs = (self.gate.log, self.lab.a.charon.log, self.lab.b.charon.log)
        status = self.gate.ask()
        words = [str({key: status[key] for key in ("errors", "negotiations")})]
        return "\n---\n".join([*(tail(log, 30) for log in logs), *words])

    # --- judgement --------------------------------------------------------------------

    def judge(self) -> None:
        """Judge the reports and captured packets since the last call."""
        reports = self.sender.ask("all")
        pauses = [(began, ended) for began, ended in reports[0]["pauses"]]
        self._judge_capture()
        events = self.recorder.events()
        gaps = {
            tunnel: widen([*self.disturbed, *kernel_gaps(events, 4, {tunnel.ends})], pauses)
            for tunnel in self.up
        }
        for report, (kind, _, _), tunnel in zip(reports, self.targets, self.tunnel_of, strict=True):
            self._count(kind, report)
            if tunnel is not None and tunnel not in gaps:
                self.evidence.let_go += report["counts"].get("", 0)
            elif tunnel is not None:
                self._judge(kind, report, tunnel, gaps[tunnel])

    def _count(self, kind: str, report: dict[str, Any]) -> None:
        evidence, counts = self.evidence, report["counts"]
        evidence.attempts += sum(counts.values())
        evidence.refused += counts.get("EPERM", 0) + counts.get("EHOSTUNREACH", 0)
        evidence.streams += report["made"] if kind == "stream" else 0
        for name, count in counts.items():
            if name:
                evidence.errors[name] = evidence.errors.get(name, 0) + count

    def _judge(
        self, kind: str, report: dict[str, Any], tunnel: Tunnel, gaps: Sequence[Span]
    ) -> None:
        for began, ended, name in report["failed"]:
            if not any(begin <= ended and began <= end for begin, end in gaps):
                near = min((max(b - ended, began - e) for b, e in gaps), default=math.inf)
                self.evidence.wrong.append(
                    f"{kind} to {tunnel.name}: {name} at {began:.3f}, {near * 1000:.0f} ms off"
                )

    def _judge_capture(self) -> None:
        """Judge the packets since the last call; the next capture begins before this one ends."""
        last, self._capture = self._capture, self.lab.capture()
        self._capture.start()
        for packet in last.stop().packets if last is not None else ():
            if packet.kind is Kind.ESP:
                self.evidence.esp += 1
            elif packet.kind is Kind.CLEAR and packet.sender == "a":
                if str(packet.daddr) == OPEN:
                    self.evidence.in_clear += 1
                elif not packet.daddr or packet.daddr in REMOTE:
                    self.evidence.leaked.append(packet)

    def close(self) -> None:
        """End the capture."""
        if self._capture is not None:
            self._capture.close()


def batch(host: Host, lines: Iterable[str]) -> None:
    """Run lines of ip(8) in a host."""
    command = ["ip", "-n", host.namespace.name, "-batch", "-"]
    subprocess.run(command, input="\n".join(lines), text=True, check=True, capture_output=True)


@contextlib.contextmanager
def build_hub(
    cache: Path, seed: int, sites: int, warriors: int, name: str = "ipsecgate-hub"
) -> Iterator[Hub]:
    """Build a hub with a running gate and no connections; the end of the block removes it.

    `cache` has the compiled hooks.
    """
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(name))
        lab.warm_up(("tunnel",), (4,))
        hub, via = lab.a.inner[4], lab.b.outer[4]
        batch(lab.a, [f"route add {REMOTE} via {via} src {hub}", f"route add {PEERS} via {via}"])
        batch(lab.b, [f"addr add {OPEN}/24 dev eth0"])
        recorder = lab.record()
        gate = stack.enter_context(Gated(lab, cache=cache))
        made = Hub(lab, gate, recorder, make_tunnels(Random(seed), hub, sites, warriors))
        stack.callback(made.close)
        Reporter(lab.b, World.argv("server", str(PORT)))
        yield made
