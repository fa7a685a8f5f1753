"""Run programs under `ipsecgate exec`, and check their packets on the wire."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

from ipsecgate.lab import traffic
from ipsecgate.lab.capture import Captured
from ipsecgate.lab.endpoints import Client, Report
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab

PORT = 7200
PIPE = subprocess.PIPE


def start(lab: Lab, gate: Gated, command: Sequence[str], *options: str) -> subprocess.Popen[str]:
    argv = gate.exec_argv(*command, options=options)
    return lab.a.popen(argv, stdin=PIPE, stdout=PIPE, stderr=PIPE)


def say(process: subprocess.Popen[str]) -> None:
    """Send the line for which a call waits (see `held_client`)."""
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def ended(process: subprocess.Popen[str], timeout: float = 60.0) -> dict[str, Any]:
    output, errors = process.communicate(timeout=timeout)
    assert output, f"it ended with {process.returncode}: {errors}"
    result: dict[str, Any] = json.loads(output)
    return result


def run(lab: Lab, gate: Gated, command: Sequence[str], *options: str) -> dict[str, Any]:
    return ended(start(lab, gate, command, *options))


def client(lab: Lab, gate: Gated, role: str, spec: ConnSpec, *options: str) -> Report:
    command = traffic.command(role, "--to", str(lab.b.address(spec)), "--port", str(PORT), *options)
    return Client(start(lab, gate, command)).result()


def wait_held(gate: Gated, count: int = 1, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while (held := len(gate.ask()["holds"])) != count:
        assert time.monotonic() < deadline, f"{held} are held"
        time.sleep(0.01 + held / 1000)  # a long answer takes the controller's time


@contextlib.contextmanager
def nothing_in_clear(lab: Lab, *, esp: bool) -> Iterator[None]:
    """Assert that the block sends nothing in clear, repeats no SYN, and sends ESP or none."""
    before = lab.a.counters()["TcpExtTCPSynRetrans"]
    with lab.capture() as capture:
        yield
        seen: Captured = capture.stop()
    assert not seen.clear
    assert bool(seen.esp) is esp
    assert lab.a.counters()["TcpExtTCPSynRetrans"] == before


@contextlib.contextmanager
def paused(pid: int) -> Iterator[None]:
    """Pause a process (SIGSTOP) during the block."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def stopped(lab: Lab) -> AbstractContextManager[None]:
    """Pause strongSwan during the block: a negotiation neither succeeds nor fails."""
    return paused(lab.a.charon.pid)
