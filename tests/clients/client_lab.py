"""A lab for real clients: two hosts, a gate on a, server daemons on b; and the results of a client.

Runs that need it begin without an SA, and IKE takes two round trips with `DELAY` to negotiate one.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from ipsecgate.core.model.flow import Address
from ipsecgate.lab.capture import Captured
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.clients import daemons
from tests.clients.catalogue import RealClient, catalogue

DELAY = 25.0  # ms, one way
LIMIT = 120.0  # seconds after which a client counts as hung
SETTLE_TIMEOUT = 60.0
SPEC = ConnSpec("net", "tunnel", 4, start_action="trap")
POLICIES = """\
[[policy]]
name = "forbidden"
remote = ["192.0.2.3"]
action = "discard"
[[policy]]
name = "net"
remote = ["203.0.113.0/24"]
"""
SAYS = {
    "EPERM": ("Operation not permitted", "EPERM"),
    "EHOSTUNREACH": ("No route to host", "EHOSTUNREACH", "Host is unreachable"),
    "ETIMEDOUT": ("Connection timed out", "ETIMEDOUT", "Operation timed out"),
}


class End(Enum):
    """How a client ended whose calls failed."""

    SERVED = "is served"
    NAMED = "says it"
    VAGUE = "says that it is not connected"
    OTHER = "ends otherwise"
    BELIEVED = "believes itself connected"
    HUNG = "hangs"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of a client. `code`: None if it hung. `output`: stdout and stderr.

    `retransmitted`: SYNs. `refused`: calls that the hooks refused. `held`: calls that were held.
    """

    client: RealClient = field(repr=False)
    code: int | None
    output: str
    seconds: float
    seen: Captured
    retransmitted: int
    refused: int
    held: int

    @property
    def served(self) -> bool:
        return self.code == 0 and self.client.served in self.output

    def end(self, error: str) -> End:
        """Return how the client ended; its calls failed with `error` (the name of an errno)."""
        if self.code is None:
            return End.HUNG
        if self.code == 0:
            return End.SERVED if self.served else End.BELIEVED
        if any(words.lower() in self.output.lower() for words in SAYS[error]):
            return End.NAMED
        vague = any(words in self.output for words in self.client.vague)
        return End.VAGUE if vague else End.OTHER

    def error_line(self, error: str) -> str:
        """Return the output line that names `error`, else the last line."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        found = [
            line for line in lines if any(w.lower() in line.lower() for w in SAYS[error])
        ] or lines[-1:]
        return found[0] if found else ""


@dataclass(frozen=True, slots=True)
class ClientLab:
    """A lab with a gate. Clients by name: `to_net` go to the protected net, `forbidden` do not."""

    lab: Lab
    gate: Gated
    to_net: Mapping[str, RealClient]
    forbidden: Mapping[str, RealClient]

    @property
    def net(self) -> Address:
        """The server's address in the protected network."""
        return self.lab.b.inner[4]

    @property
    def forbidden_to(self) -> Address:
        """The server's address that the gate refuses."""
        return self.lab.b.bare[4]

    def without_sa(self) -> None:
        """Drop all SAs on both hosts, and wait until the gate has noticed."""
        self.until(lambda: all(host.namespace.tcp_is_quiet() for host in (self.lab.a, self.lab.b)))
        self._drop()
        if self.state() == "back-off":
            self.lab.a.charon.initiate(SPEC.child_name)  # any new SA ends the back-off
            self.until(lambda: self.state() == "covered")
            self._drop()

    def _drop(self) -> None:
        """Drop every SA, repeatedly, because a negotiation may be under way."""
        hosts = (self.lab.a, self.lab.b)

        def is_gone() -> bool:
            for host in hosts:
                host.charon.drop_all()
            idle = all(host.charon.idle() for host in hosts)
            return idle and self.state() in ("uncovered", "back-off")

        self.until(is_gone)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition, for a limited time."""
        deadline = time.monotonic() + SETTLE_TIMEOUT
        while not condition():
            assert time.monotonic() < deadline, f"the child is {self.state()}"
            time.sleep(0.02)

    def state(self) -> str:
        """Return the coverage state of the child, as the gate reports it."""
        found = [item["state"] for item in self.gate.ask()["negotiations"]]
        return str(found[0]) if found else "uncovered"

    def attempts(self) -> int:
        """Return the number of negotiations that the gate has begun."""
        return sum(item["attempts"] for item in self.gate.ask()["negotiations"])

    def unserved(self, error: str, names: Sequence[str]) -> Iterator[Outcome]:
        """Run clients whose calls fail with `error`: EPERM, EHOSTUNREACH or ETIMEDOUT."""
        match error:
            case "EPERM":  # refused by a policy, without holding
                for name in names:
                    yield self.run(self.forbidden[name])
            case "EHOSTUNREACH":  # IKE fails: the peer has another key
                self.without_sa()
                self.lab.break_psk()
                for name in names:
                    yield self.run(self.to_net[name], hold="30s")
                self.lab.mend_psk()
            case _:  # the peer does not answer, and the hold ends before IKE gives up
                self.lab.a.charon.configure("retransmit_timeout = 60")
                for name in names:
                    self.without_sa()
                    self.lab.drop_ike()
                    yield self.run(self.to_net[name], hold="500ms")
                    self.lab.drop_ike(False)
                self.lab.a.charon.configure("")

    def run(
        self, client: RealClient, *options: str, hold: str | None = None, gated: bool = True
    ) -> Outcome:
        """Run a client with a capture, by default in the gated cgroup.

        `hold`: run it under `ipsecgate exec --hold HOLD`, with further `options`; None: without.
        """
        argv = list(client.argv)
        if hold is not None:
            argv = self.gate.exec_argv(*argv, options=("--hold", hold, *options))
        before = self._counters()
        began = time.monotonic()
        with self.lab.capture() as capture:
            code, output = self._run(argv, self.gate.cgroup if gated else None)
            seconds = time.monotonic() - began
            time.sleep(2 * DELAY / 1000)
            seen = capture.stop()
        counted = (after - b for after, b in zip(self._counters(), before, strict=True))
        return Outcome(client, code, output, seconds, seen, *counted)

    def _counters(self) -> tuple[int, int, int]:
        """Return the counts of SYN retransmissions, refused calls and held calls so far."""
        refused = sum(n for name, n in self.gate.reasons().items() if name.startswith("refuse"))
        held: int = self.gate.ask()["held"]
        return self.lab.a.counters()["TcpExtTCPSynRetrans"], refused, held

    def _run(self, argv: list[str], cgroup: Path | None) -> tuple[int | None, str]:
        process = self.lab.a.popen(
            argv, cgroup=cgroup, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            return None, output
        return process.returncode, output


@contextlib.contextmanager
def client_lab(
    name: str, cache: Path, ports: Collection[int] = tuple(daemons.DAEMONS)
) -> Iterator[ClientLab]:
    """Make the lab, with the daemons of these ports; `cache` has the compiled hooks."""
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(name))
        lab.warm_up(("tunnel",), (4,))
        folder = stack.enter_context(daemons.serving(lab.b, ports))
        gate = stack.enter_context(Gated(lab, policies=POLICIES, cache=cache))
        lab.load(SPEC)
        gate.wait_policy(SPEC.name)
        lab.set_delay(DELAY)
        to_net, forbidden = (
            {client.name: client for client in catalogue(str(to), folder / "key")}
            for to in (lab.b.inner[4], lab.b.bare[4])
        )
        yield ClientLab(lab, gate, to_net, forbidden)
