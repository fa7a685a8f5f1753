"""Calls held by `ipsecgate exec` across real negotiations, on real ESP.

Packets are judged by a capture between the hosts, retransmissions by the kernel's
counter, errors by the application's own word: never by the gate's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab

PORT = 7200


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-hold") as lab:
        lab.warm_up()
        lab.b.serve("tcp-server", PORT)
        lab.b.serve("udp-server", PORT)
        yield lab


@pytest.fixture
def lab(module_lab: Lab) -> Lab:
    module_lab.set_delay(0)
    module_lab.reset()
    return module_lab


@pytest.fixture(scope="module")
def module_gate(module_lab: Lab, cache: Path) -> Iterator[Gated]:
    with Gated(module_lab, cache=cache) as gate:
        yield gate


@pytest.fixture
def gate(lab: Lab, module_gate: Gated) -> Gated:
    """A gate that runs and covers nothing: the lab was reset."""
    if module_gate.process is None:
        module_gate.start()
    while any(n["state"] == "back-off" for n in module_gate.ask()["negotiations"]):
        time.sleep(0.1)
    return module_gate


def prepared(lab: Lab, gate: Gated, mode: str = "tunnel", family: int = 4,
             start_action: str = "trap") -> ConnSpec:  # fmt: skip
    spec = ConnSpec(f"{mode}-{family}", mode, family, start_action=start_action)
    lab.load(spec)
    gate.wait_policy(spec.name)
    return spec


CONNECT = """
import socket, sys
s = socket.create_connection((sys.argv[1], int(sys.argv[2])))
s.sendall(b"*")
print(s.recv(1) == b"*")
"""


def test_first(lab: Lab, gate: Gated) -> None:
    spec = prepared(lab, gate)
    lab.set_delay(25)
    before = lab.a.counters()
    with lab.capture() as capture:
        done = lab.a.run(
            gate.holding(sys.executable, "-c", CONNECT, str(lab.b.address(spec)), str(PORT)),
            check=False,
        )
        seen = capture.stop()
    print(done, gate.ask(), gate.log.read_text(), gate.reasons())
    assert done.stdout == "True\n"
    assert not seen.clear
    assert seen.esp
    assert lab.a.counters()["TcpRetransSegs"] == before["TcpRetransSegs"]
