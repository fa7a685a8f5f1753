"""Programs whose memory or descriptors block the inspector: only their own calls suffer."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import Lab
from ipsecgate.lab.uml import children_of
from tests.processes import process_state
from tests.system import held_client
from tests.system.connections import load_connection
from tests.system.stalling_file import FLUSH, READ, StallingFile
from tests.system.under_exec import PORT, ended, nothing_in_clear, run, start, stopped, wait_held
from tests.until import wait_until

pytestmark = pytest.mark.second_guest


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-hold-hostile") as lab:
        lab.warm_up(["tunnel"], [4])
        lab.b.serve("tcp-server", PORT)
        yield lab


@pytest.fixture
def gate(lab: Lab, cache: Path) -> Iterator[Gated]:
    with Gated(lab, cache=cache) as gate:
        yield gate


@pytest.fixture
def file(tmp_path: Path) -> Iterator[StallingFile]:
    with StallingFile(tmp_path / "file") as file:
        yield file


def children(gate: Gated) -> list[int]:
    """Return the child processes of the controller: its inspectors."""
    assert gate.process
    return children_of(gate.process.pid)


def waits_in_the_kernel(pid: int) -> bool:
    """Return whether a thread of a process is in an uninterruptible wait."""
    threads = [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]
    return "D" in [process_state(pid, thread) for thread in threads]


def said(gate: Gated) -> bool:
    return "blocks the inspection of its call" in gate.log.read_text()


@pytest.mark.parametrize(("call", "waits_for"), [("served", READ), ("posing", FLUSH)])
def test_a_call_that_blocks_the_inspector_does_not_affect_others(
    lab: Lab, gate: Gated, file: StallingFile, call: str, waits_for: int
) -> None:
    spec = load_connection(lab, gate)
    address = lab.b.address(spec)
    with nothing_in_clear(lab, esp=True):
        with stopped(lab):
            hostile = start(lab, gate, held_client.command(call, address, PORT, file.path))
            wait_until(lambda: waits_for in file.asked, "the call was not inspected")
            assert gate.ask()["ready"]
            other = start(lab, gate, held_client.command("tcp", address, PORT))
            wait_held(gate)
            wait_until(lambda: said(gate), "nothing was logged")
        assert ended(other)["error"] == ""
        assert run(lab, gate, held_client.command("tcp", address, PORT))["error"] == ""
    hostile.kill()


def test_the_blocking_process_is_refused_instead_of_held(
    lab: Lab, gate: Gated, file: StallingFile
) -> None:
    spec = load_connection(lab, gate)
    with nothing_in_clear(lab, esp=False), stopped(lab):
        hostile = start(
            lab, gate, held_client.command("posing", lab.b.address(spec), PORT, file.path)
        )
        wait_until(lambda: said(gate), "nothing was logged")
        assert hostile.stdout
        result = json.loads(hostile.stdout.readline())  # its exit also blocks
        hostile.kill()
    assert result["first"]["error"] == "ENOTSOCK", "the kernel's own errno"
    assert result["error"] == "EPERM"


def test_the_next_controller_does_not_wait_for_a_blocked_inspector(
    lab: Lab, gate: Gated, file: StallingFile
) -> None:
    spec = load_connection(lab, gate)
    hostile = start(lab, gate, held_client.command("posing", lab.b.address(spec), PORT, file.path))
    wait_until(lambda: FLUSH in file.asked, "the call was not inspected")
    (inspector,) = children(gate)
    gate.kill()
    wait_until(lambda: waits_in_the_kernel(inspector), "the inspector ended with its controller")
    gate.start()
    assert run(lab, gate, held_client.command("tcp", lab.b.address(spec), PORT))["error"] == ""
    assert waits_in_the_kernel(inspector)
    hostile.kill()


def test_a_killed_inspector_is_replaced(lab: Lab, gate: Gated) -> None:
    spec = load_connection(lab, gate)
    command = held_client.command("tcp", lab.b.address(spec), PORT)
    idle = start(lab, gate, ["sleep", "60"])
    wait_until(lambda: bool(children(gate)), "no inspector is running")
    (first,) = children(gate)
    os.kill(first, signal.SIGKILL)
    assert run(lab, gate, command)["error"] == ""
    (second,) = children(gate)
    assert second != first
    idle.kill()
