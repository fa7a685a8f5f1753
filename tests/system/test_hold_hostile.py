"""Programs whose memory or descriptors block the inspector: only their own calls suffer."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import Lab
from ipsecgate.lab.uml import children_of
from tests.processes import alive, process_state
from tests.system import held_client
from tests.system.connections import load_connection
from tests.system.stalling_file import FLUSH, READ, StallingFile
from tests.system.under_exec import (
    PORT,
    ended,
    nothing_in_clear,
    run,
    say,
    start,
    stopped,
    wait_held,
)
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


def inspectors(gate: Gated) -> list[int]:
    """Return the inspectors: the children of the controller's only child."""
    assert gate.process
    return sorted(alive(each for one in children_of(gate.process.pid) for each in children_of(one)))


def waits_in_the_kernel(pid: int) -> bool:
    """Return whether a process is in an uninterruptible wait."""
    return process_state(pid) == "D"


def said(gate: Gated, times: int = 1) -> bool:
    return gate.log.read_text().count("blocks the inspection of its call") >= times


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
    with stopped(lab), nothing_in_clear(lab, esp=False):
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
    (inspector,) = inspectors(gate)
    gate.kill()
    wait_until(lambda: waits_in_the_kernel(inspector), "the inspector ended with its controller")
    gate.start()
    assert run(lab, gate, held_client.command("tcp", lab.b.address(spec), PORT))["error"] == ""
    assert waits_in_the_kernel(inspector)
    hostile.kill()


def test_calls_are_held_again_once_nobody_blocks_the_inspector(
    lab: Lab, gate: Gated, tmp_path: Path
) -> None:
    spec = load_connection(lab, gate)
    refused = gate.reasons()["refuse_uncovered"]
    with nothing_in_clear(lab, esp=True):
        with StallingFile(tmp_path / "file") as file:
            command = held_client.command("posing_twice", lab.b.address(spec), PORT, file.path)
            process = start(lab, gate, command)
            wait_until(lambda: said(gate), "nothing was logged")
            wait_until(lambda: len(inspectors(gate)) == 2, "it was not replaced")
            wait_until(lambda: gate.reasons()["refuse_uncovered"] > refused, "no second call")
        wait_until(lambda: len(inspectors(gate)) == 1, "it is still blocked")
        say(process)
        result = ended(process)
    assert result["first"]["error"] == "ENOTSOCK"
    assert result["second"]["error"] == "EPERM", "refused, while the inspector was blocked"
    assert result["error"] == "", "held"


def test_many_that_block_their_inspectors_delay_nobody_else(
    lab: Lab, gate: Gated, tmp_path: Path
) -> None:
    """A program whose covered calls are answered by its inspector, without a pause."""
    spec = load_connection(lab, gate)
    address = lab.b.address(spec)
    assert run(lab, gate, held_client.command("tcp", address, PORT))["error"] == ""
    with ExitStack() as stack:
        # A file each: otherwise they also wait for each other.
        calls = [
            (call, stack.enter_context(StallingFile(tmp_path / f"{call} {number}")).path)
            for call in ("served", "posing") for number in range(2)
        ]  # fmt: skip
        hostile = [
            start(lab, gate, held_client.command(call, address, PORT, path)) for call, path in calls
        ]
        busy = start(lab, gate, held_client.command("hammer", address, PORT))
        wait_until(lambda: said(gate, len(hostile)), "not all of them are blocked")
        before = gate.reasons()["allow_associated"]
        wait_until(lambda: gate.reasons()["allow_associated"] > before, "no call was made")
        result = ended(busy)
        for process in hostile:
            process.kill()
    assert result["errors"] == [""]


def test_a_killed_inspector_is_replaced(lab: Lab, gate: Gated) -> None:
    spec = load_connection(lab, gate)
    command = held_client.command("tcp", lab.b.address(spec), PORT)
    idle = start(lab, gate, ["sleep", "60"])
    wait_until(lambda: bool(inspectors(gate)), "no inspector is running")
    (first,) = inspectors(gate)
    os.kill(first, signal.SIGKILL)
    assert run(lab, gate, command)["error"] == ""
    wait_until(lambda: len(inspectors(gate)) == 1, "the program has ended, and its inspector")
    assert inspectors(gate) != [first]
    idle.kill()
