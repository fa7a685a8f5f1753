"""A sock_addr program of another tool that gives calls another destination, on real ESP.

It is attached to the gated cgroup before the hooks or after them, or to the cgroup above.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from ipsecgate.admin import loader
from ipsecgate.edges.bpf import libbpf
from ipsecgate.edges.bpf.objects import HOOKS
from ipsecgate.lab import traffic
from ipsecgate.lab.endpoints import Client, Report
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.system.connections import load_connection
from tests.system.under_exec import nothing_in_clear
from tests.until import wait_until

pytestmark = pytest.mark.second_guest

SERVICE, SERVICE_PORT = "198.18.0.9", 80
PORT = 7700
USER_IP4, USER_PORT = 4, 24  # in struct bpf_sock_addr


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-rewriters") as lab:
        lab.warm_up(families=(4,))
        lab.b.serve("tcp-server", PORT)
        argv = ["ip", "-n", lab.a.namespace.name, "route", "add", "198.18.0.0/15"]
        subprocess.run([*argv, "via", str(lab.b.outer[4])], check=True)
        yield lab


def program(backend: str, port: int) -> bytes:
    """Return the program: calls to `SERVICE` go to a backend."""

    def word(address: str) -> int:
        return int(struct.unpack("=i", ip_address(address).packed)[0])

    instructions = [
        (0x61, 0x12, USER_IP4, 0),  # r2 = ctx->user_ip4
        (0x56, 0x02, 4, word(SERVICE)),  # if (u32)r2 != SERVICE: exit
        (0xB7, 0x03, 0, word(backend)),
        (0x63, 0x31, USER_IP4, 0),  # ctx->user_ip4 = r3
        (0xB7, 0x03, 0, socket.htons(port)),
        (0x63, 0x31, USER_PORT, 0),
        (0xB7, 0x00, 0, 1),
        (0x95, 0, 0, 0),
    ]
    return b"".join(struct.pack("=BBhi", *one) for one in instructions)


@contextlib.contextmanager
def rewriting(cgroup: Path, lab: Lab, spec: ConnSpec) -> Iterator[None]:
    """Attach the program to a cgroup for the block."""
    kind = HOOKS["connect4"]
    prog = libbpf.load_program("rewrite", program(str(lab.b.address(spec)), PORT), *kind)
    directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    try:
        link = libbpf.create_link(prog, directory, kind.attach_type)
        try:
            yield
        finally:
            libbpf.detach_link(link)
            os.close(link)
    finally:
        os.close(directory)
        os.close(prog)


def called(lab: Lab, gate: Gated, *options: str) -> Report:
    """Connect in the gated cgroup; retry while the call is refused."""
    argv = traffic.command("tcp-client", "--to", SERVICE, "--port", str(SERVICE_PORT), *options)
    return Client(lab.a.popen(argv, cgroup=gate.cgroup, stdout=subprocess.PIPE)).result()


def assert_refused_and_then_let_go(lab: Lab, gate: Gated) -> None:
    before = gate.reasons()
    lab.set_delay(25)
    with nothing_in_clear(lab, esp=True):
        report = called(lab, gate)
    after = gate.reasons()
    assert report["error"] is None
    assert report["errnos"].keys() == {"EPERM"}
    assert after["block_clear"] == before["block_clear"], "the hook refused it"
    assert after["refuse_uncovered"] > before["refuse_uncovered"]


def test_a_program_that_was_attached_before_ours_is_seen_through(lab: Lab, gate: Gated) -> None:
    spec = load_connection(lab, gate, "transport")
    with rewriting(gate.cgroup, lab, spec):
        gate.cli("detach", str(gate.cgroup))
        gate.cli("attach", str(gate.cgroup))
        assert_refused_and_then_let_go(lab, gate)


def later_than_ours(gate: Gated) -> list[str]:
    return [one.hook for one in loader.runs_before(gate.paths)]


def test_a_program_that_is_attached_after_ours_is_overtaken(lab: Lab, gate: Gated) -> None:
    spec = load_connection(lab, gate, "transport")
    gate.kill()
    with rewriting(gate.cgroup, lab, spec):
        assert later_than_ours(gate) == ["connect4"]
        gate.start()
        gate.wait_policy(spec.name)
        wait_until(lambda: not later_than_ours(gate), "it was not overtaken")
        assert_refused_and_then_let_go(lab, gate)
        assert not any("runs after" in one["text"] for one in gate.ask()["errors"])


def test_a_program_of_a_cgroup_above_is_reported_and_its_packets_blocked(
    lab: Lab, gate: Gated
) -> None:
    spec = load_connection(lab, gate, "transport", start_action="none")
    lab.drop_ike()
    with rewriting(gate.cgroup.parent, lab, spec):
        before = gate.reasons()
        with lab.capture() as capture:
            assert called(lab, gate, "--limit", "2")["error"] is not None
            assert not capture.stop().clear
        assert gate.reasons()["block_clear"] > before["block_clear"]
        text = f"at {gate.cgroup.parent} runs after the gate's"
        wait_until(lambda: text in gate.log.read_text(), "it is not logged")
        assert any(text in one["text"] for one in gate.ask()["errors"])
        checked = gate.cli("check", check=False).stdout
        assert "runs after" in " ".join(checked.split())
