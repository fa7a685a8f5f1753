"""IKE knows its peer by name, and the gated resolver asks a server behind the tunnel."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from ipsecgate.core.model.problem import Problem
from ipsecgate.lab.connections import connection
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.host import Host
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.until import wait_until

PORT, DNS = 7180, 53
NAME, RESOLVER = "gw.example", "127.0.0.54"
CONFIGURATION = Path("/etc/resolv.conf")
SPEC = ConnSpec("by-name", "tunnel")
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-names") as lab:
        lab.warm_up(("tunnel",), (4,))
        lab.b.serve("tcp-server", PORT)
        yield lab


def serve(host: Host, cgroup: Path | None, words: Sequence[str]) -> None:
    """Start one of `name_server`'s roles and wait until it is ready."""
    argv = [sys.executable, "-m", "tests.system.name_server", *words]
    process = host.popen(
        argv, cgroup=cgroup, stdout=subprocess.PIPE, env={"PYTHONPATH": str(REPOSITORY)}
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


@pytest.fixture
def resolver(lab: Lab, gate: Gated) -> Iterator[str]:
    """The gated resolver that every process of the lab uses; its server is protected."""
    server = str(lab.b.inner[4])
    before = CONFIGURATION.read_bytes() if CONFIGURATION.exists() else None
    serve(lab.b, None, ("authority", server, NAME, str(lab.b.outer[4])))
    serve(lab.a, gate.cgroup, ("resolver", RESOLVER, server))
    CONFIGURATION.write_text(f"nameserver {RESOLVER}\noptions timeout:1 attempts:1\n")
    try:
        yield server
    finally:
        if before is None:
            CONFIGURATION.unlink()
        else:
            CONFIGURATION.write_bytes(before)


def load_by_name(lab: Lab, gate: Gated) -> None:
    here, there = lab.a.end(SPEC, ()), lab.b.end(SPEC, ())
    lab.b.charon.load(connection(SPEC, there, here, "none"))
    section = connection(SPEC, here, there, "none")
    section[SPEC.name]["remote_addrs"] = [NAME]
    lab.a.charon.load(section)
    gate.wait_policy(SPEC.name)


def deadlocks(gate: Gated) -> list[str]:
    return [str(Problem(**e)) for e in gate.ask()["errors"] if "waits for the address" in e["text"]]


def test_the_deadlock_is_named_and_a_bypass_for_the_lookup_ends_it(
    lab: Lab, gate: Gated, resolver: str
) -> None:
    load_by_name(lab, gate)
    with ExitStack() as stack:
        capture = stack.enter_context(lab.capture())
        client = lab.a.client(
            "tcp-client", lab.b.inner[4], PORT, "--limit", "60",
            "--retry", "EPERM,EHOSTUNREACH", cgroup=gate.cgroup,
        )  # fmt: skip
        wait_until(lambda: deadlocks(gate), "it says nothing")
        (error,) = deadlocks(gate)
        assert f"waits for the address of {NAME}" in error
        assert f'remote = ["{resolver}"]' in error
        assert "python3" in error
        assert gate.cli("status", check=False).returncode == 1
        why = json.loads(gate.cli("--json", "why", f"{resolver}:53/udp", check=False).stdout)
        assert f"waits for the address of {NAME}" in why["flows"][0]["steps"][-1]["text"]
        assert f'remote = ["{resolver}"]' in why["flows"][0]["advice"]
        assert gate.log.read_text().count("waits for the address") == 1
        assert client.process.poll() is None

        text = gate.config.read_text()
        stack.callback(gate.ask, "reload")
        stack.callback(gate.config.write_text, text)
        gate.config.write_text(
            f'{text}[[policy]]\nname = "resolver"\naction = "bypass"\nremote = ["{resolver}"]\n'
            'protocol = "udp"\nport = "53"\n'
        )
        gate.ask("reload")
        report = client.result()
        seen = capture.stop()
        assert report["error"] is None
        wait_until(lambda: not deadlocks(gate), "the error stays")
    assert seen.esp
    assert {packet.dport for packet in seen.clear if packet.sender == "a"} == {DNS}
    assert not seen.syns
