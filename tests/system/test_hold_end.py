"""Held calls when the application or the controller ends.

No call proceeds in clear and none hangs forever. If a service manager has stored the listener, the
next controller answers.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import Lab
from tests.system import held_client
from tests.system.connections import load_connection
from tests.system.fd_store import FdStore
from tests.system.under_exec import (
    PORT,
    ended,
    nothing_in_clear,
    run,
    start,
    stopped,
    wait_held,
)
from tests.until import wait_until

pytestmark = pytest.mark.second_guest


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


def test_a_dying_controller_ends_the_calls_that_it_holds(lab: Lab, gate: Gated) -> None:
    spec = load_connection(lab, gate)
    with stopped(lab), nothing_in_clear(lab, esp=False):
        process = start(lab, gate, held_client.command("twice", lab.b.address(spec), PORT))
        wait_held(gate)
        gate.kill()
        result = ended(process)
    assert result["first"]["error"] == "ENOSYS"
    assert result["error"] == "ENOSYS"
    done = lab.a.run(gate.exec_argv("echo", "ran"), check=False)
    assert done.returncode == 3
    assert "ran" not in done.stdout
    gate.start()
    assert run(lab, gate, held_client.command("tcp", lab.b.address(spec), PORT))["error"] == ""


def seccomp_listeners(gate: Gated) -> int:
    assert gate.process
    count = 0
    for fd in Path(f"/proc/{gate.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            count += "seccomp" in str(fd.readlink())
    return count


def test_a_killed_application_is_forgotten(lab: Lab, gate: Gated) -> None:
    spec = load_connection(lab, gate)
    with stopped(lab), nothing_in_clear(lab, esp=False):
        process = start(lab, gate, held_client.command("tcp", lab.b.address(spec), PORT))
        wait_held(gate)
        assert seccomp_listeners(gate) == 1
        process.kill()
        process.communicate()
        wait_held(gate, 0)
        assert seccomp_listeners(gate) == 0


def test_a_signal_ends_a_held_program(lab: Lab, gate: Gated) -> None:
    """The program has no handler for it."""
    spec = load_connection(lab, gate)
    command = ["bash", "-c", f"exec 3<>/dev/tcp/{lab.b.address(spec)}/{PORT}"]
    with stopped(lab), nothing_in_clear(lab, esp=False):
        process = start(lab, gate, command)
        wait_held(gate)
        process.terminate()
        process.communicate(timeout=60)
        wait_held(gate, 0)


@pytest.mark.parametrize("covered", [True, False])
def test_the_next_controller_answers_the_held_calls(lab: Lab, gate: Gated, covered: bool) -> None:
    """Also if the negotiation ended while no controller was running."""
    gate.kill()
    with FdStore() as store:
        store.start(gate)
        spec = load_connection(lab, gate)
        with nothing_in_clear(lab, esp=True):
            with stopped(lab):
                command = held_client.command("twice", lab.b.address(spec), PORT)
                process = start(lab, gate, command, "--hold", "2m")
                wait_held(gate)
                wait_until(store.is_given, "the listener was not stored")
                gate.kill()
                if not covered:
                    store.start(gate)
            if covered:
                wait_until(lambda: bool(lab.a.established()), "no SA")
                assert process.poll() is None
                store.start(gate)
            result = ended(process)
        assert result["first"]["error"] == ""
        assert result["error"] == ""
        assert store.kept


def test_a_busy_service_manager_receives_the_listener_later(lab: Lab, gate: Gated) -> None:
    gate.kill()
    with FdStore() as store:
        store.start(gate)
        spec = load_connection(lab, gate)
        with stopped(lab), nothing_in_clear(lab, esp=False):
            store.fill()
            process = start(lab, gate, held_client.command("tcp", lab.b.address(spec), PORT))
            wait_held(gate)
            wait_until(store.is_given, "the listener was not stored")
            process.kill()


def calls_again(gate: Gated, before: int) -> bool:
    return gate.reasons()["allow_associated"] > before + 20


def test_calls_received_but_not_answered_by_a_killed_controller_are_answered(
    lab: Lab, gate: Gated
) -> None:
    """Covered calls that it received but did not answer: several kills, to hit one of them."""
    gate.kill()
    with FdStore() as store:
        store.start(gate)
        spec = load_connection(lab, gate)
        to = lab.b.address(spec)
        assert run(lab, gate, held_client.command("tcp", to, PORT))["error"] == ""
        store.take()
        known = len(store.kept)
        process = start(lab, gate, held_client.command("hammer", to, PORT))
        wait_until(lambda: store.is_given(known), "the listener was not stored")
        for _ in range(3):
            before = gate.reasons()["allow_associated"]  # counts connects of a known socket
            wait_until(partial(calls_again, gate, before), "no call was made")
            gate.kill()
            store.start(gate)
        result = ended(process)
    assert result["errors"] == [""], "every call was answered"


def test_the_next_controller_does_not_extend_a_hold(lab: Lab, gate: Gated) -> None:
    gate.kill()
    with FdStore() as store:
        store.start(gate)
        spec = load_connection(lab, gate)
        command = held_client.command("tcp", lab.b.address(spec), PORT)
        with stopped(lab), nothing_in_clear(lab, esp=False):
            process = start(lab, gate, command, "--hold", "2m")
            wait_held(gate)
            wait_until(store.is_given, "the listener was not stored")
            gate.kill()
            time.sleep(2)
            store.start(gate)
            wait_held(gate)
            (hold,) = gate.ask()["holds"]
            process.kill()
            process.communicate()
    assert hold["limit"] < 118.5, "the next controller counted from the start of the call"
