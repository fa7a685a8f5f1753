"""Two hosts, a gate on one of them, two processes that send, and the evidence of what happens.

Host a has a default route to host b, so a packet that loses its tunnel's route would still reach
the peer in clear.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from vici.exception import CommandException

from ipsecgate.lab.capture import Capture
from ipsecgate.lab.connections import connection
from ipsecgate.lab.frames import Kind
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.host import Host
from ipsecgate.lab.hosts import Lab
from ipsecgate.lab.recorder import Recorder
from tests.chaos import held_calls
from tests.chaos.reporter import Reporter
from tests.chaos.tally import Span, Tally, kernel_gaps, widen
from tests.chaos.targets import KINDS, NEVER, NOWHERE, OPEN, PORT, PROTECTED, SPECS, Target, covered
from tests.system.fd_store import FdStore

PERIOD, HELD_PERIOD = 0.05, 0.1
RECOVERY = 40.0
STREAM_RECOVERY = 150.0  # seconds: TCP doubles its retransmission timeout with every fault
SENDER, HELD_SENDER = (Path(__file__).with_name(f"{name}.py") for name in ("sender", "held_sender"))


class NotRecoveredError(AssertionError):
    """Something that was covered did not become covered again; with logs and kernel state."""


class World:
    """Two hosts, the gate and the senders. Made by `build_world`."""

    sender: Reporter
    held_sender: Reporter

    def __init__(self, lab: Lab, gate: Gated, recorder: Recorder, store: FdStore) -> None:
        self.lab, self.gate, self.recorder, self.store = lab, gate, recorder, store
        self.route = lab.a.namespace.route()
        self.tally = Tally()
        self.disturbed: list[Span] = []  # when refusals are excused
        self.suspended: list[Span] = []  # when the controller was
        self.starting: list[Span] = []  # when it was
        self.targets = covered(lab, KINDS)
        self.targets += [("fresh", NEVER, PORT), ("tcp", NEVER, PORT), ("fresh", OPEN, PORT)]
        self.held_targets = covered(lab, held_calls.KINDS)
        self.held_targets += [
            ("sendto", NEVER, PORT),
            ("connect", NEVER, PORT),
            ("sendto", OPEN, PORT),
        ]
        self.policies = {
            (end.network_address, there.network_address)
            for end, there in (
                (lab.a.site.inner[4].network, lab.b.site.inner[4].network),
                (ip_network(lab.a.outer[6]), ip_network(lab.b.outer[6])),
            )
        }
        self.peer_lost_sas = False  # the peer's kernel lost its SAs, which its IKE cannot notice
        self._capture: Capture | None = None
        self._blocked = self._blocks()

    # --- setting up and repairing -----------------------------------------------------

    def load(self, host: Host) -> None:
        """Load the connections on one host; those already loaded stay unchanged."""
        here = host is self.lab.a
        for spec in (*SPECS, NOWHERE) if here else SPECS:
            local, remote = spec.local_ts, spec.remote_ts
            if not here:
                local, remote = remote, local
            ends = host.end(spec, local), self.lab.peer(host).end(spec, remote)
            host.charon.load(connection(spec, *ends, spec.start_action if here else "none"))

    def start(self) -> None:
        """Start the senders, and wait until everything that they send is answered."""
        host, gate = self.lab.a, self.gate
        targets = json.dumps(self.held_targets)
        argv = [sys.executable, "-S", "-I", str(HELD_SENDER), str(HELD_PERIOD), targets]
        self.store.take()  # its queue is short: make room for the listener
        self.held_sender = Reporter(
            host, gate.exec_argv(*argv, options=["--hold", f"{held_calls.HOLD:g}s"])
        )
        self.sender = Reporter(
            host, self.argv("sender", str(PERIOD), json.dumps(self.targets)), gate.cgroup
        )
        self.store.take()
        assert self.store.kept, "unless its listener is kept, it ends with the first controller"
        self.disturbed.append((-math.inf, self.recover()))
        self.judge()

    @staticmethod
    def argv(*words: str) -> list[str]:
        return [sys.executable, "-S", "-I", str(SENDER), *words]

    def start_gate(self) -> None:
        """Start a controller as a service manager would, and wait until it is ready."""
        began = time.monotonic()
        try:
            self.store.start(self.gate)
        finally:
            self.starting.append((began, time.monotonic()))

    def mend(self) -> None:
        """Restart every dead process and load missing connections, as a service manager would."""
        for host in (self.lab.a, self.lab.b):
            if not host.charon.alive:
                self.lab.restart(host)
            if not {s.name for s in SPECS} <= set(host.charon.loaded()):
                self.load(host)
        if self.peer_lost_sas:
            self.peer_lost_sas = False
            with self.lab.b.charon.session() as session:
                for spec in SPECS:
                    with contextlib.suppress(CommandException):  # there is none
                        list(session.terminate({"ike": spec.name, "timeout": "-1"}))
        self.supervise()

    def renew(self) -> None:
        """Restart everything from scratch, as an operator would as a last resort."""
        self.gate.kill()
        self.lab.reset()
        for host in (self.lab.b, self.lab.a):
            self.load(host)
        self.start_gate()
        self.recover()

    def supervise(self) -> None:
        """Start the controller again if it has exited."""
        process = self.gate.process
        if process is not None and process.poll() is not None:
            self.tally.exits.append(tail(self.gate.log, 3))
            self.gate.process = None
        if self.gate.process is None:
            self.start_gate()

    # --- reports and judgement --------------------------------------------------------

    def recover(self) -> float:
        """Wait until every covered target works; return the time. Raises: NotRecoveredError."""
        began = time.monotonic()
        while True:
            silent = [
                target
                for report, target in self._covered_reports()
                if target[0] != "stream" and not works(report, target[0], began)
            ]
            now = time.monotonic()
            if not silent:
                return now
            if now > began + RECOVERY:
                raise NotRecoveredError(f"{silent} for {RECOVERY:.0f} s\n{self.diagnosis()}")
            self.supervise()
            time.sleep(PERIOD / 2)

    def wait_streams(self) -> None:
        """Wait until the TCP connections work again. TCP's own timeouts make that slow."""
        began = time.monotonic()
        while not all(
            works(report, "kept", began)
            for report, target in self._covered_reports()
            if target[0] == "stream"
        ):
            if time.monotonic() > began + STREAM_RECOVERY:
                raise NotRecoveredError(
                    f"no stream for {STREAM_RECOVERY:.0f} s\n{self.diagnosis()}"
                )
            time.sleep(0.05)

    def _covered_reports(self) -> Iterator[tuple[dict[str, Any], Target]]:
        """Ask both senders; yield the reports about covered targets."""
        senders = ((self.sender, self.targets), (self.held_sender, self.held_targets))
        for sender, targets in senders:
            for report, target in zip(sender.ask(), targets, strict=True):
                if target[1] not in (NEVER, OPEN):
                    yield report, target

    def diagnosis(self) -> str:
        """Return the ends of the logs, the kernel's tables and the gate's status."""
        status = json.dumps(self.gate.status(), indent=1)
        logs = (self.gate.log, self.lab.a.charon.log, self.lab.b.charon.log)
        kernel = [
            subprocess.run(
                ["ip", "-n", self.lab.a.namespace.name, *words.split()],
                capture_output=True,
                text=True,
                check=False,
            ).stdout
            for words in ("xfrm state", "xfrm policy", "route show table all")
        ]
        return "\n---\n".join([*(tail(log, 40) for log in logs), *kernel, status])

    def judge(self) -> None:
        """Judge the reports and captured packets since the last call."""
        reports, held, now = self.sender.ask("all"), self.held_sender.ask("all"), time.monotonic()
        pauses = [(began, ended) for began, ended in reports[0]["pauses"]]
        self._judge_capture()
        blocked = self._blocks()
        self.tally.blocked += blocked - self._blocked
        self._blocked = blocked
        events = self.recorder.events()
        gaps = {family: kernel_gaps(events, family, self.policies) for family in (4, 6)}
        for report, target in zip(reports, self.targets, strict=True):
            spans = [*self.disturbed, *gaps[6 if ":" in target[1] else 4]]
            self._judge(report, target, widen(spans, pauses))
        absent = [*self.suspended, *self.starting]
        for report, (kind, address, _) in zip(held, self.held_targets, strict=True):
            name = f"{kind} {address}"
            calls = report["calls"]
            held_calls.count(self.tally, name, calls, report["began"], now, absent)
            if address == NEVER:
                self.tally.let_go += sum(not error for _, _, error in calls)
            elif address != OPEN:
                known = gaps[6 if ":" in address else 4]
                held_calls.judge(
                    self.tally, name, calls, known, self.disturbed, pauses, self.suspended
                )

    def _judge(self, report: dict[str, Any], target: Target, excused: Sequence[Span]) -> None:
        """Judge a report of the sender whose calls are not held."""
        tally, (kind, address, _) = self.tally, target
        counts: collections.Counter[str] = collections.Counter(report["counts"])
        tally.attempts += counts.total()
        tally.refused += counts["EPERM"] + counts["EHOSTUNREACH"]
        tally.errors.update({f"{kind} {name}": n for name, n in counts.items() if name})
        if kind == "stream":
            tally.streams += report["made"]
        if address == NEVER:
            tally.let_go += counts[""]
        elif address != OPEN:
            for began, ended, name in report["failed"]:
                if not any(begin <= ended and began <= end for begin, end in excused):
                    near = min((max(b - ended, began - e) for b, e in excused), default=math.inf)
                    tally.wrong.append(
                        (f"{kind} {address} {name}, {near * 1000:.0f} ms off", began)
                    )

    def _judge_capture(self) -> None:
        """Judge the packets since the last call; the next capture begins before this one ends."""
        last, self._capture = self._capture, self.lab.capture()
        self._capture.start()
        if last is None:
            return
        for packet in last.stop().packets:
            if packet.kind is Kind.ESP:
                self.tally.esp += 1
            elif packet.kind is Kind.CLEAR and packet.sender == "a":
                if str(packet.daddr) == OPEN:
                    self.tally.in_clear += 1
                elif packet.is_unreachable:
                    self.tally.icmp_errors += 1
                elif not packet.daddr or any(packet.daddr in net for net in PROTECTED):
                    self.tally.leaked.append(packet)

    def _blocks(self) -> int:
        return sum(n for name, n in self.gate.reasons().items() if name.startswith("block_"))

    def close(self) -> None:
        self.route.close()
        if self._capture is not None:
            self._capture.close()


def works(report: dict[str, float], kind: str, since: float) -> bool:
    """Return whether calls have succeeded since then, with an answer if the kind expects one."""
    answered = kind not in ("kept", "connected") or report["echoed"] > since
    return report["good"] > since and report["bad"] < report["good"] and answered


def tail(path: Path, lines: int) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def ip(host: Host, *words: str, check: bool = False) -> None:
    """Run ip(8) in a host."""
    command = ["ip", "-n", host.namespace.name, *words]
    subprocess.run(command, check=check, capture_output=True)
