"""A bed for real clients: two hosts, a gate on a, the daemons on b; what a client met.

Every run begins without an SA, and IKE needs two round trips of `DELAY` to make one.
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
SETTLE = 60.0
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
    """How a client ended that was not to be served."""

    SERVED = "is served"
    TOLD = "says it"
    VAGUE = "says that it is not connected"
    OTHER = "ends otherwise"
    BELIEVED = "believes itself connected"
    HUNG = "hangs"


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of a client: `code` None is a client that hung; `output` is all it printed.

    `refused` is how often the hooks refused a call, `held` how many the gate held.
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
        """Return how it ended, where its call failed with `error` (an errno's name)."""
        if self.code is None:
            return End.HUNG
        if self.code == 0:
            return End.SERVED if self.served else End.BELIEVED
        if any(words.lower() in self.output.lower() for words in SAYS[error]):
            return End.TOLD
        vague = any(words in self.output for words in self.client.vague)
        return End.VAGUE if vague else End.OTHER

    def words(self, error: str) -> str:
        """Return the line in which the client tells of `error`."""
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        found = [
            line for line in lines if any(w.lower() in line.lower() for w in SAYS[error])
        ] or lines[-1:]
        return found[0] if found else ""


@dataclass(frozen=True, slots=True)
class ClientLab:
    """Clients by name: `to_net` are bound for what must be protected, `forbidden` are not to go."""

    lab: Lab
    gate: Gated
    to_net: Mapping[str, RealClient]
    forbidden: Mapping[str, RealClient]

    @property
    def net(self) -> Address:
        """Where what must be protected is bound for."""
        return self.lab.b.inner[4]

    @property
    def forbidden_to(self) -> Address:
        """Where nothing that is gated may go."""
        return self.lab.b.bare[4]

    def without_sa(self) -> None:
        """Bring both hosts back to no SA at all, and wait until the gate knows it."""
        self.until(lambda: all(host.namespace.tcp_is_quiet() for host in (self.lab.a, self.lab.b)))
        self._drop()
        if self.state() == "back-off":
            self.lab.a.charon.initiate(SPEC.child_name)  # an SA ends it, however it came up
            self.until(lambda: self.state() == "covered")
            self._drop()

    def _drop(self) -> None:
        """Drop every SA; also what comes of a negotiation that fails by it and is repeated."""
        hosts = (self.lab.a, self.lab.b)

        def is_gone() -> bool:
            for host in hosts:
                host.charon.drop_all()
            idle = all(host.charon.idle() for host in hosts)
            return idle and self.state() in ("uncovered", "back-off")

        self.until(is_gone)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something, but not for ever."""
        deadline = time.monotonic() + SETTLE
        while not condition():
            assert time.monotonic() < deadline, f"the SA is {self.state()}, connections stay"
            time.sleep(0.02)

    def state(self) -> str:
        """Return the state of the negotiation, as the gate tells it."""
        found = [item["state"] for item in self.gate.ask()["negotiations"]]
        return str(found[0]) if found else "uncovered"

    def attempts(self) -> int:
        """Return how many negotiations the gate began."""
        return sum(item["attempts"] for item in self.gate.ask()["negotiations"])

    def unserved(self, error: str, names: Sequence[str]) -> Iterator[Outcome]:
        """Run clients whose calls fail, with EPERM, EHOSTUNREACH or ETIMEDOUT."""
        match error:
            case "EPERM":  # by a policy, and nothing holds them
                for name in names:
                    yield self.run(self.forbidden[name])
            case "EHOSTUNREACH":  # IKE fails: the peer has another key
                self.without_sa()
                self.lab.break_psk()
                for name in names:
                    yield self.run(self.to_net[name], hold="30s")
                self.lab.mend_psk()
            case _:  # the peer does not answer, and the hold is over before IKE gives up
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
        """Run a client, usually in the gated cgroup, between two looks at the wire.

        `hold` is for how long `ipsecgate exec` may hold its calls; None: it runs without.
        `options` are for that, too.
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
        """Return the SYNs sent again, the hooks' refusals and the calls held so far."""
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
    """Make the bed, with the daemons of some ports; `cache` has the compiled hooks."""
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
