"""Call connect() without pause while programs, maps, tables and controllers are replaced.

There are two variants. `hammer_hooks` runs on any kernel with BPF, so with all processors of the
machine. It writes the tables itself, and in turn loads programs, replaces the maps with those of
another version, publishes, and kills a writer half-way. `restarts.hammer_gate` does the same to a
whole gate with real IKE and ESP (`world`): it is killed, stopped and reloaded.

Some targets are always covered and never refused, the others never covered and always refused.
"""

from __future__ import annotations

import argparse
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

from ipsecgate.core.model.flow import HOST, FlowPath
from ipsecgate.core.tables.layout import LAYOUT, Setting, TableId
from ipsecgate.core.tables.table import compile_table
from ipsecgate.edges.bpf import bytecode
from ipsecgate.edges.bpf.bytecode import Bytecode
from ipsecgate.edges.bpf.datapath import Datapath
from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.errors import GateError
from tests.chaos.run import chosen_seed
from tests.system.hooked_cgroup import (
    HERE,
    PEER,
    THERE,
    HookedCgroup,
    hooked_cgroup,
    live,
    no_backstop,
    protect,
    take_over,
)

WORKERS = 2
TURNS_WANTED = 200
ETH_P_IPV6 = 0x86DD
PROCESS = Path(__file__).with_name("hammer_process.py")

Target = tuple[str, str, int, bool]


@dataclass
class Hammered:
    """The result of a run."""

    attempts: int = 0
    refused: int = 0  # although covered
    let_go: int = 0  # allowed although not covered
    leaked: int = 0  # packets on the wire to uncovered targets
    turns: collections.Counter[str] = field(default_factory=collections.Counter)
    errors: collections.Counter[str] = field(default_factory=collections.Counter)
    seconds: float = 0.0

    def figures(self) -> str:
        turns = ", ".join(f"{name} {count}" for name, count in sorted(self.turns.items()))
        errors = f" {dict(self.errors)}" if self.errors else ""
        return (
            f"{self.attempts} connect() in {self.seconds:.0f} s during {self.turns.total()} turns "
            f"({turns}): wrongly allowed {self.let_go}, leaked {self.leaked}, "
            f"wrongly refused {self.refused}{errors}"
        )

    def check(self, attempts: int, turns: int) -> None:
        assert self.attempts >= attempts
        assert self.turns.total() >= turns
        assert (self.let_go, self.leaked, self.refused) == (0, 0, 0), self.figures()


class Hammer:
    """Processes that call connect() until the block ends; then `result` has the sums."""

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
        enter = ["nsenter", f"--net={namespace}", sys.executable, "-S", "-I", str(PROCESS)]
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
        """Wait until the next process, in turn, has completed another step."""
        process = self._processes[self._due % len(self._processes)]
        self._due += 1
        assert process.stdout is not None
        assert process.stdout.readline()

    def turn(self, what: Callable[..., None], *arguments: object) -> None:
        """Perform one action on the gate, and count it by name."""
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
            output, _ = process.communicate(timeout=120)
            attempts, refused, let_go, errors = json.loads(output.splitlines()[-1])
            self.result.attempts += attempts
            self.result.refused += refused
            self.result.let_go += let_go
            self.result.errors.update(errors)
        self.result.seconds = time.monotonic() - self._began


def hammer_hooks(cache: Path, rng: random.Random, attempts: int, turns: int) -> Hammered:
    """Call connect() at least `attempts` times while performing `turns` random actions."""
    code = bytecode.get(cache)
    targets: list[Target] = [
        (kind, PEER[family], 80, family == 4) for kind in ("tcp", "udp") for family in (4, 6)
    ]
    with hooked_cgroup(f"hammer-{os.getpid()}", cache) as hooked:
        hooked.renew()
        hooked.publish(TableId.SPD, live()[0])
        wire = packet_socket(hooked)
        step = -(-attempts // turns)
        with Hammer(hooked.namespace.path, hooked.cgroup, targets, WORKERS, step) as hammer:
            for _ in range(turns):
                hammer.turn(rng.choice(TURNS), hooked, code, rng)
                hammer.wait()
        hammer.result.leaked = count(wire)
    return hammer.result


def packet_socket(hooked: HookedCgroup) -> socket.socket:
    """Return a packet socket at the far end of the link, for IPv6 only."""
    with hooked.namespace.inside():
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        wire.bind(("nowhere", ETH_P_IPV6))
    wire.setblocking(False)
    return wire


def count(wire: socket.socket) -> int:
    """Return the number of packets to the uncovered peer."""
    found = 0
    with wire:
        while True:
            try:
                frame = wire.recv(256)
            except BlockingIOError:
                return found
            found += frame[38:54] == ip_address(PEER[6]).packed


def publish(data: Datapath) -> None:
    """Publish the current tables again."""

    async def both() -> None:
        await data.publish(TableId.POLICY, compile_table(protect()))
        await data.publish(TableId.SPD, compile_table([live()[0]]))

    asyncio.run(both())


def programs_loaded(hooked: HookedCgroup, code: Bytecode, rng: random.Random) -> None:
    hooked.pins.load(code)


def tables_published(hooked: HookedCgroup, code: Bytecode, rng: random.Random) -> None:
    data = take_over(hooked.pins)
    publish(data)
    data.close()


def another_version(hooked: HookedCgroup, code: Bytecode, rng: random.Random) -> None:
    """Pretend that the loaded version has another layout, build this one beside it, and switch."""
    data = Datapath(hooked.pins)
    data.set(Setting.VERSION, LAYOUT + 1)
    data.close()
    hooked.pins.load(code)
    data = take_over(hooked.pins)
    data.set(Setting.NETNS, hooked.netns)
    no_backstop(data, hooked.link)
    data.set_paths(HOST, [(THERE[family], FlowPath(HERE[family])) for family in (4, 6)])
    publish(data)
    hooked.pins.switch()
    data.close()


def writer_killed(hooked: HookedCgroup, code: Bytecode, rng: random.Random) -> None:
    """Kill a process with SIGKILL while it loads and publishes."""
    pid = os.fork()
    if not pid:
        try:
            pins = Pins(hooked.pins.bpffs, hooked.pins.root.name)
            while True:
                pins.load(code)
                tables_published(hooked, code, rng)
        finally:
            os._exit(1)
    time.sleep(rng.uniform(0, 0.06))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


TURNS: list[Callable[[HookedCgroup, Bytecode, random.Random], None]] = [
    programs_loaded,
    tables_published,
    another_version,
    writer_killed,
]


def main() -> int:
    """Call connect() a million times during 200 turns, on this kernel if it can load the hooks.

    Otherwise in a guest, which has only one processor. CHAOS_SEED repeats a run; CHAOS_ATTEMPTS
    sets the number of calls.
    """
    argparse.ArgumentParser(
        prog="python -m tests.chaos.hammer", description=main.__doc__
    ).parse_args()
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
        result = hammer_hooks(Path(cache), random.Random(seed), attempts, TURNS_WANTED)
    sys.stdout.write(result.figures() + "\n")
    result.check(attempts, TURNS_WANTED)
    return 0


def hooks_load(cache: Path) -> bool:
    try:
        with hooked_cgroup(f"hammer-{os.getpid()}", cache):
            return True
    except (GateError, OSError, subprocess.CalledProcessError):
        return False


if __name__ == "__main__":
    sys.exit(main())
