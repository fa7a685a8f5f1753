"""What becomes of held calls when a process ends: the application's, or the controller's.

No call proceeds in clear, none hangs for ever; and where somebody keeps the listener, a
successor answers.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import Lab
from tests.system import held
from tests.system.life import until
from tests.system.opening import prepared
from tests.system.test_hold import (
    PORT,
    ended,
    nothing_in_clear,
    run,
    start,
    stopped,
    wait_held,
)

FIRST_FD = 3


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-hold-end") as lab:
        lab.warm_up(["tunnel"], [4])
        lab.b.serve("tcp-server", PORT)
        yield lab


@pytest.fixture
def gate(lab: Lab, cache: Path) -> Iterator[Gated]:
    with Gated(lab, cache=cache) as gate:
        yield gate


class Keeper:
    """What a service manager does with descriptors: takes them, and starts the successor."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.path = f"{self._folder.name}/notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self.kept: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for fd in self.kept.values():
            os.close(fd)
        self._socket.close()
        self._folder.cleanup()

    def take(self) -> None:
        """Take in what was sent so far."""
        self._socket.setblocking(False)
        while True:
            try:
                said, fds, _, _ = socket.recv_fds(self._socket, 4096, 8)
            except BlockingIOError:
                return
            words = dict(line.split("=", 1) for line in said.decode().splitlines())
            if words.get("FDSTORE") == "1":
                (self.kept[words["FDNAME"]],) = fds

    def start(self, gate: Gated) -> None:
        """Start a controller with what is kept, as systemd would."""
        self.take()
        names, fds = list(self.kept), list(self.kept.values())
        script = 'export LISTEN_PID=$$; exec "$@"'
        moved = " ".join(f"{FIRST_FD + n}<&{fd}" for n, fd in enumerate(fds))
        shell = f"exec {moved}; {script}" if fds else script
        listen = {"LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": ":".join(names)}
        gate.start(["bash", "-c", shell, "keeper"], {"NOTIFY_SOCKET": self.path, **listen}, fds)


def test_a_controller_that_dies_ends_the_calls_that_it_held(lab: Lab, gate: Gated) -> None:
    spec = prepared(lab, gate)
    with nothing_in_clear(lab, esp=False), stopped(lab):
        process = start(lab, gate, held.command("twice", lab.b.address(spec), PORT))
        wait_held(gate)
        gate.kill()
        result = ended(process, timeout=5)
    assert result["first"]["error"] == "ENOSYS"
    assert result["error"] == "ENOSYS"
    assert result["seconds"] < 1
    done = lab.a.run(gate.holding("echo", "ran"), check=False)
    assert done.returncode == 3
    assert "ran" not in done.stdout
    gate.start()
    assert run(lab, gate, held.command("tcp", lab.b.address(spec), PORT))["error"] == ""


def test_an_application_that_is_killed_is_forgotten(lab: Lab, gate: Gated) -> None:
    spec = prepared(lab, gate)
    with nothing_in_clear(lab, esp=False), stopped(lab):
        process = start(lab, gate, held.command("tcp", lab.b.address(spec), PORT))
        wait_held(gate)
        assert gate.process
        fds = Path(f"/proc/{gate.process.pid}/fd")
        listeners = [fd for fd in fds.iterdir() if "seccomp" in str(fd.readlink())]
        assert len(listeners) == 1
        process.kill()
        process.communicate()
        wait_held(gate, 0, timeout=2)
        assert not [fd for fd in fds.iterdir() if "seccomp" in str(fd.readlink())]


def test_an_interrupt_ends_a_held_program(lab: Lab, gate: Gated) -> None:
    """Where it has no handler for it."""
    spec = prepared(lab, gate)
    command = ["bash", "-c", f"exec 3<>/dev/tcp/{lab.b.address(spec)}/{PORT}"]
    with nothing_in_clear(lab, esp=False), stopped(lab):
        process = start(lab, gate, command)
        wait_held(gate)
        process.terminate()
        process.communicate(timeout=2)
        wait_held(gate, 0, timeout=2)


@pytest.mark.parametrize("covered", [True, False])
def test_a_successor_answers_what_is_held(lab: Lab, gate: Gated, covered: bool) -> None:
    """Also where the negotiation came to its end while nobody was there."""
    gate.kill()
    with Keeper() as keeper:
        keeper.start(gate)
        spec = prepared(lab, gate)
        with nothing_in_clear(lab, esp=True):
            with stopped(lab):
                process = start(lab, gate, held.command("twice", lab.b.address(spec), PORT))
                wait_held(gate)
                gate.kill()
            time.sleep(1.0 if covered else 0.0)
            assert process.poll() is None
            assert bool(lab.a.established()) or not covered
            keeper.start(gate)
            result = ended(process, timeout=20)
        assert result["first"]["error"] == ""
        assert result["error"] == ""
        assert keeper.kept


def test_calls_under_way_when_a_controller_is_killed_are_answered(lab: Lab, gate: Gated) -> None:
    """Covered calls, received and not answered yet: it is killed a few times to meet one."""
    gate.kill()
    with Keeper() as keeper:
        keeper.start(gate)
        spec = prepared(lab, gate)
        to = lab.b.address(spec)
        assert run(lab, gate, held.command("tcp", to, PORT))["error"] == ""
        before = gate.reasons()["allow_associated"]  # by a socket that connects again
        process = start(lab, gate, held.command("hammer", to, PORT, 12))
        until(lambda: gate.reasons()["allow_associated"] > before + 20, "it does not call")
        for _ in range(3):
            time.sleep(1.5)
            gate.kill()
            keeper.start(gate)
        result = ended(process, timeout=60)
    assert result["errors"] == [""]
    assert result["calls"] > 1000
    assert result["longest"] < 10


def test_a_hold_does_not_become_longer_by_a_successor(lab: Lab, gate: Gated) -> None:
    gate.kill()
    with Keeper() as keeper:
        keeper.start(gate)
        spec = prepared(lab, gate)
        command = held.command("tcp", lab.b.address(spec), PORT)
        with nothing_in_clear(lab, esp=False), stopped(lab):
            process = start(lab, gate, command, "--hold", "5s")
            wait_held(gate)
            gate.kill()
            keeper.start(gate)
            result = ended(process, timeout=20)
    assert result["error"] == "ETIMEDOUT"
    assert 5.0 <= result["seconds"] < 7.0
