"""The host's own flows under rules of NAT that change their source, on real ESP.

A rule that masquerades everything takes a protected flow out of its policy: the kernel looks the
policy up again with the new source, and the packet leaves in clear, or not at all.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator

import pytest

from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import Lab
from ipsecgate.lab.path import LINK
from tests.system import held_client
from tests.system.boxes import iptables
from tests.system.connections import load_connection
from tests.system.under_exec import PORT, client, nothing_in_clear, run
from tests.until import wait_until

pytestmark = pytest.mark.second_guest

SPARE = "-m policy --dir out --pol ipsec -j ACCEPT"
NOTICED = 6.0  # seconds: nothing notifies of a change by iptables-legacy
OTHER = "192.0.2.88"  # an address of host a that no connection has


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-translated") as lab:
        lab.warm_up(families=(4,))
        lab.b.serve("tcp-server", PORT)
        yield lab


@contextlib.contextmanager
def rules(lab: Lab, *texts: str) -> Iterator[None]:
    """Append rules of iptables to the nat table of host a for the block, and wait for the gate."""
    program = iptables(4)

    def change(verb: str) -> None:
        for text in texts:
            with lab.a.namespace.inside():
                argv = [program, "-t", "nat", verb, *text.split()]
                subprocess.run(argv, check=True, capture_output=True)

    change("-A")
    try:
        yield
    finally:
        change("-D")


def why(lab: Lab, gate: Gated, flow: str) -> str:
    return gate.cli("why", flow, check=False).stdout


def destination(lab: Lab, spec: object) -> str:
    return f"{lab.b.address(spec)}:{PORT}"  # type: ignore[arg-type]


def test_masquerading_what_is_protected_is_refused_and_said(lab: Lab, gate: Gated) -> None:
    spec = load_connection(lab, gate)
    to = destination(lab, spec)
    outer = str(lab.a.outer[4])
    command = held_client.command("tcp", lab.b.address(spec), PORT)
    before = gate.reasons()
    with rules(lab, "POSTROUTING -j MASQUERADE"):
        wait_until(lambda: f"into {outer}, by " in why(lab, gate, to), "it is not noticed")
        with nothing_in_clear(lab, esp=False):
            assert run(lab, gate, command)["error"] == "EPERM"
        told = f"into {outer}, by "
        wait_until(lambda: told in gate.log.read_text(), "the log does not say why")
        text = why(lab, gate, to)
        assert "POSTROUTING" in text
        assert "rt ipsec exists accept" in text
        assert told in gate.cli("events").stdout
    assert gate.reasons()["block_clear"] == before["block_clear"], "the hook refused it"
    # Without the rule it goes.
    wait_until(lambda: f"into {outer}" not in why(lab, gate, to), "its end is not noticed")
    with nothing_in_clear(lab, esp=True):
        assert client(lab, gate, "tcp-client", spec)["attempts"] == 1


def test_masquerading_behind_a_policy_match_changes_nothing(lab: Lab, gate: Gated) -> None:
    spec = load_connection(lab, gate)
    with rules(lab, f"POSTROUTING {SPARE}", "POSTROUTING -j MASQUERADE"):
        time.sleep(NOTICED)
        lab.set_delay(25)
        with nothing_in_clear(lab, esp=True):
            report = client(lab, gate, "tcp-client", spec)
        assert report["error"] is None
        assert report["attempts"] == 1


def test_a_source_that_becomes_a_policys_is_refused_too(lab: Lab, gate: Gated) -> None:
    """The backstop sees such a packet in clear before the kernel looks again."""
    spec = load_connection(lab, gate, "transport")
    to = destination(lab, spec)
    there, here = lab.b.address(spec), lab.a.address(spec)
    ip = ["ip", "-n", lab.a.namespace.name]
    subprocess.run([*ip, "address", "add", f"{OTHER}/32", "dev", "lo"], check=True)
    route = [f"{there}/32", "dev", LINK, "src", OTHER]
    try:
        subprocess.run([*ip, "route", "add", *route], check=True)
        with rules(lab, f"POSTROUTING -s {OTHER} -j SNAT --to-source {here}"):
            wait_until(lambda: f"{OTHER} into {here}" in why(lab, gate, to), "not noticed")
            command = held_client.command("tcp", there, PORT)
            with nothing_in_clear(lab, esp=False):
                assert run(lab, gate, command)["error"] == "EPERM"
    finally:
        subprocess.run([*ip, "address", "del", f"{OTHER}/32", "dev", "lo"], check=False)
        subprocess.run([*ip, "route", "del", *route], check=False, capture_output=True)
    with nothing_in_clear(lab, esp=True):
        assert client(lab, gate, "tcp-client", spec)["attempts"] == 1
