"""connect() without a pause, while programs, maps, tables and controllers come and go.

Two ways. `native`: on any kernel with BPF, so with all processors there are; the tables are
written by hand, and what goes round is loading programs, replacing maps by another version's,
publishing, and a writer that is killed in the middle. `real`: a whole controller, real IKE and ESP
(`world`), that is killed, ended, reloaded and upgraded.

One target is covered all the time and never refused, one is never covered and always refused.
"""

from __future__ import annotations

import asyncio
import collections
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Self

from ipsecgate.core.layout import LAYOUT, Setting, TableId
from ipsecgate.core.table import compile_table
from ipsecgate.edges import bytecode
from ipsecgate.edges.bytecode import Bytecode
from ipsecgate.edges.datapath import Datapath
from ipsecgate.edges.pins import Pins
from ipsecgate.errors import GateError
from tests.chaos.run import chosen_seed
from tests.system.bed import HERE, PEER, THERE, Bed, live, no_backstop, protect
from tests.system.bed import bed as make_bed

WORKERS = 2
TURNS_WANTED = 200
ETH_P_IPV6 = 0x86DD
HAMMERER = Path(__file__).with_name("hammerer.py")

Target = tuple[str, str, int, bool]


@dataclass
class Hammered:
    """What came of it."""

    attempts: int = 0
    refused: int = 0  # though covered
    let_go: int = 0  # though not covered
    leaked: int = 0  # packets on the wire of what is not covered
    turns: collections.Counter[str] = field(default_factory=collections.Counter)
    errors: collections.Counter[str] = field(default_factory=collections.Counter)
    seconds: float = 0.0

    def figures(self) -> str:
        turns = ", ".join(f"{name} {count}" for name, count in sorted(self.turns.items()))
        errors = f" {dict(self.errors)}" if self.errors else ""
        return (
            f"{self.attempts} connect() in {self.seconds:.0f} s beside {self.turns.total()} turns "
            f"({turns}): let go uncovered {self.let_go}, leaked {self.leaked}, "
            f"wrongly refused {self.refused}{errors}"
        )

    def check(self, attempts: int, turns: int) -> None:
        assert self.attempts >= attempts
        assert self.turns.total() >= turns
        assert (self.let_go, self.leaked, self.refused) == (0, 0, 0), self.figures()


class Hammer:
    """Processes that hammer until the block ends; what they met is in `result` then."""

    def __init__(
        self,
        namespace: Path,
        cgroup: Path,
        targets: Sequence[Target],
        workers: int,
        step: int,
    ) -> None:
        self.result = Hammered()
        script = 'echo 0 > "$0" && exec "$@"'
        enter = ["nsenter", f"--net={namespace}", sys.executable, "-S", "-I", str(HAMMERER)]
        words = [json.dumps(targets), str(step)]
        self._began = time.monotonic()
        self._due = 0
        self._processes = [
            subprocess.Popen(
                ["sh", "-c", script, f"{cgroup}/cgroup.procs", *enter, *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(workers)
        ]
        for _ in self._processes:
            self.wait()

    def wait(self) -> None:
        """Wait until one of them has done another step."""
        process = self._processes[self._due % len(self._processes)]
        self._due += 1
        assert process.stdout is not None
        assert process.stdout.readline()

    def turn(self, what: Callable[..., None], *arguments: object) -> None:
        """Do something in the life of a gate, and count it."""
        what(*arguments)
        self.result.turns[what.__name__.replace("_", " ")] += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes:
            if kind is not None:
                process.kill()
                process.communicate()
                continue
            said, _ = process.communicate(timeout=120)
            attempts, refused, let_go, errors = json.loads(said.splitlines()[-1])
            self.result.attempts += attempts
            self.result.refused += refused
            self.result.let_go += let_go
            self.result.errors.update(errors)
        self.result.seconds = time.monotonic() - self._began


def native(cache: Path, rng: random.Random, attempts: int, turns: int) -> Hammered:
    """Hammer the hooks, at least `attempts` times, beside so many turns."""
    code = bytecode.get(cache)
    targets: list[Target] = [
        (kind, PEER[family], 80, family == 4) for kind in ("tcp", "udp") for family in (4, 6)
    ]
    with make_bed(f"hammer-{os.getpid()}", cache) as bed:
        bed.renew()
        bed.publish(TableId.SPD, live()[0])
        wire = watched(bed)
        step = -(-attempts // turns)
        with Hammer(bed.namespace.path, bed.cgroup, targets, WORKERS, step) as hammer:
            for _ in range(turns):
                hammer.turn(rng.choice(TURNS), bed, code, rng)
                hammer.wait()
        hammer.result.leaked = count(wire)
    return hammer.result


def watched(bed: Bed) -> socket.socket:
    """Return a socket that sees what arrives at the other end of the way out, IPv6 only."""
    with bed.namespace.inside():
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        wire.bind(("nowhere", ETH_P_IPV6))
    wire.setblocking(False)
    return wire


def count(wire: socket.socket) -> int:
    """Return how many packets went to the peer that is not covered."""
    found = 0
    with wire:
        while True:
            try:
                frame = wire.recv(256)
            except BlockingIOError:
                return found
            found += frame[38:54] == ip_address(PEER[6]).packed


def publish(data: Datapath) -> None:
    """Publish what is in force, anew."""

    async def both() -> None:
        await data.publish(TableId.POLICY, compile_table(protect()))
        await data.publish(TableId.SPD, compile_table([live()[0]]))
        while data.clearing:
            await asyncio.sleep(0.001)

    asyncio.run(both())


def programs_loaded(bed: Bed, code: Bytecode, rng: random.Random) -> None:
    bed.pins.load(code)


def tables_published(bed: Bed, code: Bytecode, rng: random.Random) -> None:
    data = Datapath(bed.pins)
    publish(data)
    data.close()


def another_version(bed: Bed, code: Bytecode, rng: random.Random) -> None:
    """The one in force has other maps: this one is built beside it and then put in its place."""
    data = Datapath(bed.pins)
    data.set(Setting.VERSION, LAYOUT + 1)
    data.close()
    bed.pins.load(code)
    data = Datapath(bed.pins)
    data.set(Setting.NETNS, bed.netns)
    no_backstop(data, bed.link)
    data.set_sources([(THERE[family], HERE[family]) for family in (4, 6)])
    publish(data)
    bed.pins.switch()
    data.close()


def writer_killed(bed: Bed, code: Bytecode, rng: random.Random) -> None:
    """SIGKILL in the middle of loading and publishing."""
    pid = os.fork()
    if not pid:
        try:
            pins = Pins(bed.pins.bpffs, bed.pins.root.name)
            while True:
                pins.load(code)
                tables_published(bed, code, rng)
        finally:
            os._exit(1)
    time.sleep(rng.uniform(0, 0.06))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


TURNS: list[Callable[[Bed, Bytecode, random.Random], None]] = [
    programs_loaded,
    tables_published,
    another_version,
    writer_killed,
]


def main() -> int:
    """Hammer the hooks a million times beside 200 turns: here if hooks load here, else in a guest.

    This kernel is better: it has all processors.
    """
    seed = chosen_seed()
    attempts = int(os.environ.get("CHAOS_ATTEMPTS") or 1_000_000)
    with tempfile.TemporaryDirectory() as cache:
        if not hooks_load(Path(cache)):
            words = [
                *["-m", "ipsecgate.lab.guest", "--always", "--timeout", "3000", "--"],
                sys.executable,
            ]
            os.execv(sys.executable, [sys.executable, *words, "-m", "tests.chaos.hammer"])
        sys.stdout.write(f"seed {seed}\n")
        sys.stdout.flush()
        result = native(Path(cache), random.Random(seed), attempts, TURNS_WANTED)
    sys.stdout.write(result.figures() + "\n")
    result.check(attempts, TURNS_WANTED)
    return 0


def hooks_load(cache: Path) -> bool:
    try:
        with make_bed(f"hammer-{os.getpid()}", cache):
            return True
    except (GateError, OSError, subprocess.CalledProcessError):
        return False


if __name__ == "__main__":
    sys.exit(main())
