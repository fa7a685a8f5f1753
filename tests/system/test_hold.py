"""Calls held by `ipsecgate exec` across real negotiations, on real ESP.

The evidence is a capture between the hosts, the kernel's counter of retransmissions, and the
errors that the application got; never the gate's own status.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from ipsecgate.core.model.policy import HOLD, HOLD_IMPATIENT
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import FAMILIES, MODES, Lab
from tests.processes import may_run_first
from tests.system import held_client
from tests.system.connections import load_connection
from tests.system.under_exec import (
    PORT,
    client,
    ended,
    nothing_in_clear,
    run,
    say,
    start,
    stopped,
    wait_held,
)
from tests.until import wait_until

DATAGRAMS = 5
THREADS = 500
MEMORY = 40  # MiB
SIGNALS = 5


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-hold") as lab:
        lab.warm_up()
        lab.b.serve("tcp-server", PORT)
        yield lab


# --- held, then let through -------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_a_connect_is_held_until_covered(lab: Lab, gate: Gated, mode: str, family: int) -> None:
    spec = load_connection(lab, gate, mode, family)
    lab.set_delay(25)
    before = gate.ask()["held"]
    reasons = gate.reasons()
    with nothing_in_clear(lab, esp=True):
        report = client(lab, gate, "tcp-client", spec)
    assert report["error"] is None
    assert report["echoed"]
    assert report["attempts"] == 1
    assert gate.ask()["held"] == before + 1 == gate.status()["counters"]["held"]
    after = gate.reasons()
    assert after["refuse_uncovered"] == reasons["refuse_uncovered"], "no hook refused the call"
    assert after["allow_covered"] == reasons["allow_covered"] + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sendto_is_held_and_no_datagram_is_lost(lab: Lab, gate: Gated, family: int) -> None:
    spec = load_connection(lab, gate, family=family)
    lab.set_delay(25)
    with lab.b.serve("udp-server", PORT) as server, nothing_in_clear(lab, esp=True):
        report = client(lab, gate, "udp-client", spec, "--count", str(DATAGRAMS))
        report_b = server.report(DATAGRAMS, 1.0)
    assert report["errnos"] == {}
    assert report["attempts"] == DATAGRAMS
    assert report_b["distinct"] == DATAGRAMS


def test_a_call_is_held_without_a_trap(lab: Lab, gate: Gated) -> None:
    """strongSwan has no policy in the kernel, so an open gate would mean packets in clear."""
    spec = load_connection(lab, gate, start_action="none")
    with nothing_in_clear(lab, esp=True):
        assert client(lab, gate, "tcp-client", spec)["attempts"] == 1


@pytest.mark.parametrize("call", ["udp_connect", "sendmsg", "sendmmsg", "tcp"])
def test_every_call_to_an_ipv4_mapped_address_is_held(lab: Lab, gate: Gated, call: str) -> None:
    spec = load_connection(lab, gate)
    lab.set_delay(25)
    before = gate.ask()["held"]
    to = f"::ffff:{lab.b.address(spec)}"
    with nothing_in_clear(lab, esp=call != "udp_connect"):
        result = run(lab, gate, held_client.command(call, to, PORT), "--udp")
    assert result["error"] == ""
    assert result["seconds"] > 0.1
    assert gate.ask()["held"] == before + 1


def test_without_udp_a_sendmsg_is_refused_instead_of_held(lab: Lab, gate: Gated) -> None:
    spec = load_connection(lab, gate)
    with nothing_in_clear(lab, esp=False):
        result = run(lab, gate, held_client.command("sendmsg", lab.b.address(spec), PORT))
    assert result["error"] == "EPERM"


def test_a_non_blocking_connect_is_held_and_then_in_progress(lab: Lab, gate: Gated) -> None:
    spec = load_connection(lab, gate)
    lab.set_delay(25)
    with nothing_in_clear(lab, esp=True):
        result = run(lab, gate, held_client.command("non_blocking", lab.b.address(spec), PORT))
    assert result["error"] == "EINPROGRESS"
    assert result["seconds"] > 0.1


def test_a_bound_source_outside_the_selector_is_never_covered(lab: Lab, gate: Gated) -> None:
    """No SA ever covers a flow from an address outside the child's selector."""
    spec = load_connection(lab, gate)
    inside = held_client.command("bound", lab.b.address(spec), PORT, lab.a.address(spec))
    outside = held_client.command("bound", lab.b.address(spec), PORT, lab.a.bare[4])
    with nothing_in_clear(lab, esp=False):
        assert run(lab, gate, outside, "--hold", "500ms")["error"] == "ETIMEDOUT"
    assert run(lab, gate, inside)["error"] == ""


def test_covered_and_unprotected_calls_are_not_held(lab: Lab, gate: Gated) -> None:
    spec = load_connection(lab, gate)
    assert run(lab, gate, held_client.command("tcp", lab.b.address(spec), PORT))["error"] == ""
    before = gate.ask()["held"]
    for address in (lab.b.address(spec), lab.b.bare[4], lab.b.bare[6]):
        assert run(lab, gate, held_client.command("tcp", address, PORT))["error"] == ""
    for here in ("127.0.0.1", "::1", "0.0.0.0"):
        assert run(lab, gate, held_client.command("tcp", here, PORT))["error"] == "ECONNREFUSED"
    assert gate.ask()["held"] == before


def test_many_threads_wait_for_one_negotiation(lab: Lab, gate: Gated) -> None:
    spec = load_connection(lab, gate)
    before = gate.ask()["held"]
    attempts = sum(n["attempts"] for n in gate.ask()["negotiations"])
    with nothing_in_clear(lab, esp=True):
        command = held_client.command("threads", lab.b.address(spec), PORT, THREADS)
        process = start(lab, gate, command, "--hold", "2m")
        # The test kernel needs tens of milliseconds to create a thread.
        tasks = Path(f"/proc/{process.pid}/task")
        wait_until(lambda: len(list(tasks.iterdir())) > THREADS, "too few threads", timeout=110)
        os.kill(lab.a.charon.pid, signal.SIGSTOP)  # until all threads are held
        say(process)
        wait_held(gate, THREADS, timeout=110)
        spread = gate.spread(THREADS, lambda: os.kill(lab.a.charon.pid, signal.SIGCONT))
        result = ended(process)
    assert result["errors"] == [""]
    assert gate.ask()["held"] == before + THREADS
    assert len(lab.a.established()) == 1
    assert sum(n["attempts"] for n in gate.ask()["negotiations"]) == attempts + 1
    assert gate.memory() < MEMORY
    assert spread.at_hooks < 10, "the threads continue together"
    assert gate.process is not None
    pid = gate.process.pid  # the flag stays after it had real-time priority for the answers
    flag = os.SCHED_RESET_ON_FORK if may_run_first() else 0
    assert os.sched_getscheduler(pid) == os.SCHED_OTHER | flag
    assert os.getpriority(os.PRIO_PROCESS, pid) == -20


# --- held, then refused ------------------------------------------------------------------


@pytest.mark.parametrize("call", ["tcp", "sendmsg"])
def test_a_held_call_times_out(lab: Lab, gate: Gated, call: str) -> None:
    spec = load_connection(lab, gate)
    lab.drop_ike()
    command = held_client.command(call, lab.b.address(spec), PORT)
    with nothing_in_clear(lab, esp=False):
        result = run(lab, gate, command, "--udp", "--hold", "1s")
    assert result["error"] == "ETIMEDOUT"
    assert 1.0 <= result["seconds"] < HOLD
    wait_until(lambda: "was held for 1.0 s" in gate.log.read_text(), "the timeout is not logged")


@pytest.mark.parametrize("call", ["non_blocking", "udp_connect"])
def test_a_non_blocking_call_has_a_shorter_limit(lab: Lab, gate: Gated, call: str) -> None:
    spec = load_connection(lab, gate)
    with stopped(lab), nothing_in_clear(lab, esp=False):
        result = run(lab, gate, held_client.command(call, lab.b.address(spec), PORT))
    assert result["error"] == "ETIMEDOUT"
    assert HOLD_IMPATIENT <= result["seconds"] < HOLD


def test_a_failed_negotiation_ends_the_call_at_once(lab: Lab, gate: Gated) -> None:
    spec = load_connection(lab, gate)
    lab.break_psk()
    with nothing_in_clear(lab, esp=False):
        result = run(lab, gate, held_client.command("tcp", lab.b.address(spec), PORT))
    assert result["error"] == "EHOSTUNREACH", "not ETIMEDOUT, the errno at the limit"

    def last_error() -> str:
        """If the first failure was slow, only a later one has the cause."""
        run(lab, gate, held_client.command("tcp", lab.b.address(spec), PORT))
        (one,) = (n for n in gate.ask()["negotiations"] if n["child"].startswith(spec.name))
        return str(one["last_error"])

    wait_until(lambda: "AUTH" in last_error().upper(), "the cause is never reported")
    wait_until(lambda: last_error() in gate.log.read_text(), "it is not logged")


# --- attempts to get around it --------------------------------------------------------------


def test_changing_the_address_of_a_held_call_gains_nothing(lab: Lab, gate: Gated) -> None:
    covered = load_connection(lab, gate, "tunnel")
    uncovered = load_connection(lab, gate, "transport")
    to, other = lab.b.address(covered), lab.b.address(uncovered)
    with nothing_in_clear(lab, esp=False):
        with stopped(lab):
            process = start(lab, gate, held_client.command("flip", to, PORT, other))
            wait_held(gate)
            say(process)
            assert process.stderr
            assert process.stderr.readline() == "changed\n"
        assert ended(process)["error"] == "EPERM"


def test_changing_the_address_all_the_time_gains_nothing(lab: Lab, gate: Gated) -> None:
    covered = load_connection(lab, gate, "tunnel")
    to = lab.b.address(covered)
    assert run(lab, gate, held_client.command("tcp", to, PORT))["error"] == ""
    uncovered = load_connection(lab, gate, "transport")
    lab.break_psk()
    other = lab.b.address(uncovered)
    with nothing_in_clear(lab, esp=False):
        command = held_client.command("flip_all_the_time", to, PORT, other)
        reached = run(lab, gate, command, "--hold", "10ms")["reached"]
    assert set(reached) <= {str(to), "EPERM", "EHOSTUNREACH", "ETIMEDOUT"}
    assert len(reached) > 1
    assert str(to) in reached


def test_odd_calls_fail_as_usual_and_do_not_end_the_controller(lab: Lab, gate: Gated) -> None:
    spec = load_connection(lab, gate)
    result = run(lab, gate, held_client.command("odd", lab.b.address(spec), PORT))
    assert all(result["errors"])
    assert "EPERM" not in result["errors"]
    assert result["error"] == ""
    assert gate.process
    assert gate.process.poll() is None


def test_a_connect_by_io_uring_is_refused_instead_of_held(lab: Lab, gate: Gated) -> None:
    spec = load_connection(lab, gate)
    lab.drop_ike()
    with nothing_in_clear(lab, esp=False):
        result = run(lab, gate, held_client.command("uring_connect", lab.b.address(spec), PORT))
    assert result["error"] in ("EPERM", "EHOSTUNREACH")


# --- signals, users, and the command line --------------------------------------------------


def test_handled_signals_restart_the_call_without_extending_its_limit(
    lab: Lab, gate: Gated
) -> None:
    """Each signal arrives while the call is held; the call is interrupted and restarted."""
    spec = load_connection(lab, gate)
    limits = []
    with nothing_in_clear(lab, esp=True):
        with stopped(lab):
            command = held_client.command("handling", lab.b.address(spec), PORT)
            process = start(lab, gate, command, "--hold", "2m")
            wait_held(gate)
            for _ in range(SIGNALS):
                status = gate.ask()
                limits += [hold["limit"] for hold in status["holds"]]
                process.send_signal(signal.SIGALRM)
                wait_until(partial(is_held_again, gate, status["held"]), "it is not held again")
        result = ended(process)
    assert result["error"] == ""
    assert result["handled"] == len(limits) == SIGNALS
    assert limits == sorted(set(limits), reverse=True), "only the rest of the time remains"


def is_held_again(gate: Gated, before: int) -> bool:
    status = gate.ask()
    return bool(status["held"] > before and status["holds"])


def test_exec_changes_the_user_and_keeps_setuid_programs_working(
    lab: Lab, gate: Gated, tmp_path: Path
) -> None:
    for folder in (tmp_path, *list(tmp_path.parents)[:-2]):
        folder.chmod(0o755)
    program = tmp_path / "id"
    shutil.copy("/usr/bin/id", program)
    program.chmod(0o4755)
    command = gate.exec_argv("sh", "-c", f"id -u; {program} -u", options=["--user", "nobody"])
    assert lab.a.run(command).stdout.split() == ["65534", "0"]


def test_a_second_listener_is_refused(lab: Lab, gate: Gated) -> None:
    command = gate.exec_argv(*gate.exec_argv("true"))
    done = lab.a.run(command, check=False)
    assert done.returncode == 1
    assert "already has a seccomp listener" in done.stderr


def test_an_inherited_internet_socket_is_refused(lab: Lab, gate: Gated) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        fd = sock.fileno()
        command = [*lab.a.launcher(), *gate.exec_argv("echo", "ran")]
        done = subprocess.run(command, pass_fds=[fd], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"descriptor {fd} is an Internet socket" in " ".join(done.stderr.split())
    assert "ran" not in done.stdout


def test_exec_returns_the_exit_code_of_the_command(lab: Lab, gate: Gated, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no program")
    codes = {
        ("sh", "-c", "exit 7"): 7,
        ("/nonexistent",): 127,
        (str(tmp_path / "text"),): 126,
    }
    for command, code in codes.items():
        assert lab.a.run(gate.exec_argv(*command), check=False).returncode == code
    elsewhere = gate.exec_argv("true", options=["--cgroup", str(lab.cgroup("elsewhere"))])
    done = lab.a.run(elsewhere, check=False)
    assert done.returncode == 2
    assert "is not gated" in done.stderr
