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
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from ipsecgate.lab.capture import Capture
from ipsecgate.lab.frames import Kind
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.host import Host
from ipsecgate.lab.hosts import ConnSpec, Lab
from ipsecgate.lab.path import LINK
from ipsecgate.lab.strongswan import connection
from tests.chaos.tally import Span, Tally, kernel_gaps, spread
from tests.system.witness import Witness

PORT, CLOSED_PORT = 7400, 7401
PERIOD = 0.05
RECOVERY = 40.0
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
SPEAKER = Path(__file__).with_name("speaker.py")

Told = list[dict[str, Any]]


class NotRecoveredError(AssertionError):
    """What was covered is not again, with everybody's last words."""


class World:
    """The whole bed. Made by `world`."""

    def __init__(self, lab: Lab, gate: Gated, witness: Witness) -> None:
        self.lab, self.gate, self.witness = lab, gate, witness
        self.route = lab.a.namespace.route()
        self.tally = Tally()
        self.troubles: list[Span] = []
        self.targets: list[tuple[str, str, int]] = [
            (kind, str(lab.b.address(spec)), CLOSED_PORT if kind == "tcp" else PORT)
            for spec in SPECS
            for kind in KINDS
        ]
        self.covered = len(self.targets)
        self.targets += [("fresh", NEVER, PORT), ("tcp", NEVER, PORT), ("fresh", OPEN, PORT)]
        self.speaker: subprocess.Popen[str] | None = None
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
        """Have the process speak, and wait until all that it says is answered."""
        process = self.lab.a.popen(
            self.argv("speaker", str(PERIOD), json.dumps(self.targets)),
            cgroup=self.gate.cgroup,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        self.speaker = process
        self.troubles.append((-math.inf, self.recover()))
        self.judge()

    @staticmethod
    def argv(*words: str) -> list[str]:
        return [sys.executable, "-S", "-I", str(SPEAKER), *words]

    def ask(self, word: str = "?") -> Told:
        assert self.speaker is not None
        assert self.speaker.stdin is not None
        assert self.speaker.stdout is not None
        self.speaker.stdin.write(f"{word}\n")
        self.speaker.stdin.flush()
        told: Told = json.loads(self.speaker.stdout.readline())
        return told

    def mend(self) -> None:
        """Have everybody alive who should be, as a service manager would."""
        for host in (self.lab.a, self.lab.b):
            if not host.charon.alive:
                self.lab.restart(host)
            if not {s.name for s in SPECS} <= set(host.charon.loaded()):
                self.load(host)
        self.supervise()

    def renew(self) -> None:
        """Begin anew, as an operator would who has lost patience."""
        self.gate.kill()
        self.lab.reset()
        for host in (self.lab.b, self.lab.a):
            self.load(host)
        self.gate.start()
        self.recover()

    def supervise(self) -> None:
        """Start the controller again if it is gone."""
        process = self.gate.process
        if process is not None and process.poll() is not None:
            self.tally.ended.append(tail(self.gate.log, 3))
            self.gate.process = None
        if self.gate.process is None:
            self.gate.start()

    # --- what came of it --------------------------------------------------------------

    def recover(self) -> float:
        """Wait until all that is covered works, return when. Raises: NotRecoveredError."""
        began = time.monotonic()
        while True:
            told = self.ask()[: self.covered]
            silent = [
                self.targets[at]
                for at, one in enumerate(told)
                if self.targets[at][0] != "stream" and not works(one, self.targets[at][0], began)
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
            for one, target in zip(self.ask(), self.targets, strict=True)
            if target[0] == "stream"
        ):
            if time.monotonic() > began + RECOVERY:
                raise NotRecoveredError(f"no stream for {RECOVERY:.0f} s\n{self.last_words()}")
            time.sleep(0.05)

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
        told, tally = self.ask("all"), self.tally
        self._see()
        blocked = self._blocks()
        tally.blocked += blocked - self._blocked
        self._blocked = blocked
        gaps = {family: kernel_gaps(self.witness.events(), family) for family in (4, 6)}
        for at, (one, (kind, address, _)) in enumerate(zip(told, self.targets, strict=True)):
            counts: collections.Counter[str] = collections.Counter(one["counts"])
            tally.attempts += counts.total()
            tally.refused += counts["EPERM"] + counts["EHOSTUNREACH"]
            if address == NEVER:
                tally.let_go += counts[""]
            if kind == "stream":
                tally.streams += one["made"]
            tally.errors.update({f"{kind} {name}": n for name, n in counts.items() if name})
            if at < self.covered:
                spans = [*self.troubles, *gaps[6 if ":" in address else 4]]
                tally.wrong += [
                    (f"{kind} {address} {name}", began)
                    for began, ended, name in one["failed"]
                    if not any(begin <= ended and began <= end for begin, end in spread(spans))
                ]

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
                elif not packet.daddr or any(packet.daddr in net for net in PROTECTED):
                    self.tally.leaked.append(packet)

    def _blocks(self) -> int:
        return sum(n for name, n in self.gate.reasons().items() if name.startswith("block_"))

    def close(self) -> None:
        self.route.close()
        if self._capture is not None:
            self._capture.close()


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


def know_neighbour(host: Host, peer: Host) -> None:
    """Tell a host its peer's link address, for good.

    A transport-mode policy for all protocols between two IPv6 neighbours has their neighbour
    discovery, too. With a trap and no SA they could not find each other any more, IKE included.
    """
    with peer.namespace.route() as route:
        (link,) = route.get_links(ifname=LINK)
    address = dict(link["attrs"])["IFLA_ADDRESS"]
    to = str(peer.outer[6])
    ip(host, "neigh", "replace", to, "lladdr", address, "dev", LINK, "nud", "permanent", check=True)


@contextlib.contextmanager
def world(cache: Path, name: str = "ipsecgate-chaos") -> Iterator[World]:
    """Build the bed, everything covered and spoken to; all of it is gone at the end."""
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(name))
        lab.warm_up(("tunnel",), (4,))
        lab.warm_up(("transport",), (6,))
        lab.a.namespace.sysctl("ipv4/ping_group_range", "0 0")
        ip(lab.b, "addr", "add", f"{OPEN}/24", "dev", "eth0", check=True)
        ip(lab.a, "route", "add", "default", "via", str(lab.b.outer[4]), check=True)
        for host in (lab.a, lab.b):
            know_neighbour(host, lab.peer(host))
        server = lab.b.popen(
            World.argv("server", str(PORT)), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert server.stdout is not None
        server.stdout.readline()
        witness = Witness(lab.a.namespace, lab.a.outer.values())
        stack.callback(witness.close)
        gate = stack.enter_context(Gated(lab, cache=cache))
        made = World(lab, gate, witness)
        stack.callback(made.close)
        for host in (lab.b, lab.a):
            made.load(host)
        for spec in (*SPECS, NOWHERE):
            gate.wait_policy(spec.name)
        made.start()
        yield made
