"""Two hosts, a gate on one, a process that speaks, and who sees what comes of it.

    net     tunnel mode over IPv4, trapped            host    transport mode over IPv6, trapped
    never   a connection that the peer doesn't know: always refused, never on the wire
    open    an address that no connection names: always let go, and on the wire in clear

The last two are the witnesses' own proof: who sees no clear packet must have seen these, and who
is never refused must have been refused there. Host a has a default route to host b, so whatever
loses its tunnel's route would go on to the peer in clear.
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
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.chaos import waiting
from tests.chaos.tally import Span, Tally, kernel_gaps, spread
from tests.chaos.voice import Voice
from tests.system.fd_store import FdStore
from tests.system.kernel_events import KernelEvents

PORT, CLOSED_PORT = 7400, 7401
PERIOD, HELD_PERIOD = 0.05, 0.1
RECOVERY = 40.0
STREAMS = 150.0  # TCP doubles its own wait with every fault
OPEN = "192.0.2.9"
NEVER = "192.0.2.3"
DPD = {"dpd_delay": "1"}
SPECS = (
    ConnSpec("net", "tunnel", 4, start_action="trap", options=DPD),
    ConnSpec("host", "transport", 6, start_action="trap", options=DPD),
)
NOWHERE = ConnSpec("never", "transport", 4, remote_ts=(f"{NEVER}/32",))
PROTECTED = [ip_network(text) for text in ("203.0.113.0/24", "2001:db8::2/128", f"{NEVER}/32")]
KINDS = ("fresh", "kept", "connected", "tcp", "stream", "ping", "raw")
SPEAKER, WAITER = (Path(__file__).with_name(f"{name}.py") for name in ("speaker", "waiter"))

Target = tuple[str, str, int]


class NotRecoveredError(AssertionError):
    """What was covered is not again, with everybody's last words."""


class World:
    """The whole bed. Made by `world`."""

    speaker: Voice
    waiter: Voice  # its calls are held

    def __init__(self, lab: Lab, gate: Gated, kernel_events: KernelEvents, store: FdStore) -> None:
        self.lab, self.gate, self.kernel_events, self.store = lab, gate, kernel_events, store
        self.route = lab.a.namespace.route()
        self.tally = Tally()
        self.troubles: list[Span] = []
        self.targets = covered(lab, KINDS)
        self.targets += [("fresh", NEVER, PORT), ("tcp", NEVER, PORT), ("fresh", OPEN, PORT)]
        self.waits = covered(lab, waiting.KINDS)
        self.waits += [("sendto", NEVER, PORT), ("connect", NEVER, PORT), ("sendto", OPEN, PORT)]
        self.policies = {
            (end.network_address, there.network_address)
            for end, there in (
                (lab.a.site.inner[4].network, lab.b.site.inner[4].network),
                (ip_network(lab.a.outer[6]), ip_network(lab.b.outer[6])),
            )
        }
        self.forgetful = False  # the peer's kernel lost its SAs, and its IKE has no way to know
        self._capture: Capture | None = None
        self._blocked = self._blocks()

    # --- the bed ----------------------------------------------------------------------

    def load(self, host: Host) -> None:
        """Load the connections on one host; what is loaded already stays as it is."""
        here = host is self.lab.a
        for spec in (*SPECS, NOWHERE) if here else SPECS:
            local, remote = spec.local_ts, spec.remote_ts
            if not here:
                local, remote = remote, local
            ends = host.end(spec, local), self.lab.peer(host).end(spec, remote)
            host.charon.load(connection(spec, *ends, spec.start_action if here else "none"))

    def start(self) -> None:
        """Have the processes speak, and wait until all that they say is answered."""
        host, gate = self.lab.a, self.gate
        words = [sys.executable, "-S", "-I", str(WAITER), str(HELD_PERIOD), json.dumps(self.waits)]
        self.store.take()  # its queue is short: there must be room for the listener
        self.waiter = Voice(host, gate.exec_argv(*words, options=["--hold", f"{waiting.HOLD:g}s"]))
        self.speaker = Voice(
            host, self.argv("speaker", str(PERIOD), json.dumps(self.targets)), gate.cgroup
        )
        self.store.take()
        assert self.store.kept, "without its listener it would end with the first controller"
        self.troubles.append((-math.inf, self.recover()))
        self.judge()

    @staticmethod
    def argv(*words: str) -> list[str]:
        return [sys.executable, "-S", "-I", str(SPEAKER), *words]

    def start_gate(self) -> None:
        """Start a controller as a service manager would, and wait until it is ready."""
        self.store.start(self.gate)

    def mend(self) -> None:
        """Have everybody alive who should be, as a service manager would."""
        for host in (self.lab.a, self.lab.b):
            if not host.charon.alive:
                self.lab.restart(host)
            if not {s.name for s in SPECS} <= set(host.charon.loaded()):
                self.load(host)
        if self.forgetful:
            self.forgetful = False
            with self.lab.b.charon.session() as session:
                for spec in SPECS:
                    with contextlib.suppress(CommandException):  # it has none
                        list(session.terminate({"ike": spec.name, "timeout": "-1"}))
        self.supervise()

    def renew(self) -> None:
        """Begin anew, as an operator would who has lost patience."""
        self.gate.kill()
        self.lab.reset()
        for host in (self.lab.b, self.lab.a):
            self.load(host)
        self.start_gate()
        self.recover()

    def supervise(self) -> None:
        """Start the controller again if it is gone."""
        process = self.gate.process
        if process is not None and process.poll() is not None:
            self.tally.ended.append(tail(self.gate.log, 3))
            self.gate.process = None
        if self.gate.process is None:
            self.start_gate()

    # --- what came of it --------------------------------------------------------------

    def recover(self) -> float:
        """Wait until all that is covered works, return when. Raises: NotRecoveredError."""
        began = time.monotonic()
        while True:
            silent = [
                target
                for one, target in self._told_of_covered()
                if target[0] != "stream" and not works(one, target[0], began)
            ]
            now = time.monotonic()
            if not silent:
                return now
            if now > began + RECOVERY:
                raise NotRecoveredError(f"{silent} for {RECOVERY:.0f} s\n{self.last_words()}")
            self.supervise()
            time.sleep(PERIOD / 2)

    def wait_streams(self) -> None:
        """Wait until what stood before a fault goes on. TCP may take its time."""
        began = time.monotonic()
        while not all(
            works(one, "kept", began)
            for one, target in self._told_of_covered()
            if target[0] == "stream"
        ):
            if time.monotonic() > began + STREAMS:
                raise NotRecoveredError(f"no stream for {STREAMS:.0f} s\n{self.last_words()}")
            time.sleep(0.05)

    def _told_of_covered(self) -> Iterator[tuple[dict[str, Any], Target]]:
        """Ask everybody; yield what is said of the targets that are covered."""
        for voice, targets in ((self.speaker, self.targets), (self.waiter, self.waits)):
            for one, target in zip(voice.ask(), targets, strict=True):
                if target[1] not in (NEVER, OPEN):
                    yield one, target

    def last_words(self) -> str:
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
        """Take in what was said and seen since the last time."""
        told, waited, now = self.speaker.ask("all"), self.waiter.ask("all"), time.monotonic()
        pauses = [(began, ended) for began, ended in told[0]["pauses"]]
        self._see()
        blocked = self._blocks()
        self.tally.blocked += blocked - self._blocked
        self._blocked = blocked
        events = self.kernel_events.events()
        gaps = {family: kernel_gaps(events, family, self.policies) for family in (4, 6)}
        for one, target in zip(told, self.targets, strict=True):
            spans = [*self.troubles, *gaps[6 if ":" in target[1] else 4]]
            self._judge(one, target, spread(spans, pauses))
        for one, (kind, address, _) in zip(waited, self.waits, strict=True):
            name = f"{kind} {address}"
            waiting.take(self.tally, name, one["calls"], one["began"], now)
            if address == NEVER:
                self.tally.let_go += sum(not error for _, _, error in one["calls"])
            elif address != OPEN:
                known = gaps[6 if ":" in address else 4]
                waiting.judge(self.tally, name, one["calls"], known, self.troubles, pauses)

    def _judge(self, one: dict[str, Any], target: Target, excused: Sequence[Span]) -> None:
        """Take in what the process met that is not held."""
        tally, (kind, address, _) = self.tally, target
        counts: collections.Counter[str] = collections.Counter(one["counts"])
        tally.attempts += counts.total()
        tally.refused += counts["EPERM"] + counts["EHOSTUNREACH"]
        tally.errors.update({f"{kind} {name}": n for name, n in counts.items() if name})
        if kind == "stream":
            tally.streams += one["made"]
        if address == NEVER:
            tally.let_go += counts[""]
        elif address != OPEN:
            for began, ended, name in one["failed"]:
                if not any(begin <= ended and began <= end for begin, end in excused):
                    near = min((max(b - ended, began - e) for b, e in excused), default=math.inf)
                    tally.wrong.append(
                        (f"{kind} {address} {name}, {near * 1000:.0f} ms off", began)
                    )

    def _see(self) -> None:
        """Look at what was on the wire; the next capture begins before the last one ends."""
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
                    self.tally.complaints += 1
                elif not packet.daddr or any(packet.daddr in net for net in PROTECTED):
                    self.tally.leaked.append(packet)

    def _blocks(self) -> int:
        return sum(n for name, n in self.gate.reasons().items() if name.startswith("block_"))

    def close(self) -> None:
        self.route.close()
        if self._capture is not None:
            self._capture.close()


def covered(lab: Lab, kinds: Sequence[str]) -> list[Target]:
    return [
        (kind, str(lab.b.address(spec)), CLOSED_PORT if kind in ("tcp", "connect") else PORT)
        for spec in SPECS
        for kind in kinds
    ]


def works(one: dict[str, float], kind: str, since: float) -> bool:
    """Tell whether a target was let go, and answered where it asks, since then."""
    answered = kind not in ("kept", "connected") or one["echoed"] > since
    return one["good"] > since and one["bad"] < one["good"] and answered


def tail(path: Path, lines: int) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def ip(host: Host, *words: str, check: bool = False) -> None:
    """Run ip(8) in a host."""
    command = ["ip", "-n", host.namespace.name, *words]
    subprocess.run(command, check=check, capture_output=True)
