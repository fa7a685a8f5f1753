"""Service addresses that rules of NAT lead to protected backends, on real ESP.

The hooks see the service address; the packets have the backend's.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from ipsecgate.lab import traffic
from ipsecgate.lab.endpoints import Client, Report
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.system.connections import load_connection
from tests.system.test_translated import rules
from tests.system.under_exec import nothing_in_clear
from tests.until import wait_until

pytestmark = pytest.mark.second_guest

SERVICE, SERVICE_PORT = "198.18.0.9", 80
OTHER_BACKEND = "198.51.100.77"  # that no connection protects, but a policy names
PORT = 7600


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-services") as lab:
        lab.warm_up(families=(4,))
        lab.b.serve("tcp-server", PORT)
        lab.b.serve("udp-server", PORT)
        argv = ["ip", "-n", lab.a.namespace.name, "route", "add", "198.18.0.0/15"]
        subprocess.run([*argv, "via", str(lab.b.outer[4])], check=True)
        yield lab


def dnat(lab: Lab, spec: ConnSpec, proto: str = "tcp", more: str = "") -> str:
    backend = f"{lab.b.address(spec)}:{PORT}"
    return f"OUTPUT -d {SERVICE} -p {proto} --dport {SERVICE_PORT} {more} -j DNAT --to {backend}"


def command(role: str, *options: str) -> list[str]:
    return traffic.command(role, "--to", SERVICE, "--port", str(SERVICE_PORT), *options)


def held(lab: Lab, gate: Gated, role: str, *options: str, hold: str = "30s") -> Report:
    argv = gate.exec_argv(*command(role, *options), options=("--hold", hold))
    return Client(lab.a.popen(argv, stdout=subprocess.PIPE)).result()


def why(gate: Gated) -> str:
    text = gate.cli("why", f"{SERVICE}:{SERVICE_PORT}", check=False).stdout
    return " ".join(text.split())


def noticed(lab: Lab, gate: Gated, spec: ConnSpec) -> None:
    text = f"becomes tcp {lab.b.address(spec)}:{PORT}, by "
    wait_until(lambda: text in why(gate), "the rule is not noticed")


@pytest.mark.parametrize("start_action", ["trap", "none"])
def test_a_call_to_a_service_is_held_until_its_backend_is_covered(
    lab: Lab, gate: Gated, start_action: str
) -> None:
    spec = load_connection(lab, gate, "transport", start_action=start_action)
    with rules(lab, dnat(lab, spec)):
        noticed(lab, gate, spec)
        lab.set_delay(25)
        with nothing_in_clear(lab, esp=True):
            report = held(lab, gate, "tcp-client")
        assert report["error"] is None
        assert report["echoed"]
        assert report["attempts"] == 1
        lab.let_tcp_close()  # a packet that is blocked later would start a negotiation


def test_a_call_to_a_service_is_refused_and_then_let_go(lab: Lab, gate: Gated) -> None:
    spec = load_connection(lab, gate, "transport")
    with rules(lab, dnat(lab, spec)):
        noticed(lab, gate, spec)
        lab.set_delay(25)
        before = gate.reasons()
        with nothing_in_clear(lab, esp=True):
            pipe = subprocess.PIPE
            process = lab.a.popen(command("tcp-client"), cgroup=gate.cgroup, stdout=pipe)
            report = Client(process).result()
        after = gate.reasons()
    assert report["error"] is None
    assert report["errnos"].keys() == {"EPERM"}
    assert after["refuse_uncovered"] > before["refuse_uncovered"]
    assert after["block_clear"] == before["block_clear"], "the hook refused it"


def test_datagrams_to_a_service_are_held(lab: Lab, gate: Gated) -> None:
    spec = load_connection(lab, gate, "transport")
    rule = dnat(lab, spec, "udp")
    with rules(lab, rule, dnat(lab, spec)):
        noticed(lab, gate, spec)
        lab.set_delay(25)
        with nothing_in_clear(lab, esp=True):
            report = held(lab, gate, "udp-client", "--count", "3")
    assert report["errnos"] == {}
    assert report["attempts"] == 3


def test_one_backend_without_an_sa_refuses_the_service(lab: Lab, gate: Gated) -> None:
    """Either may be taken, so both must be covered."""
    spec = load_connection(lab, gate, "transport")
    other = load_connection(lab, gate, "tunnel")
    half = "-m statistic --mode random --probability 0.5"
    rule = dnat(lab, other, more=half)
    with rules(lab, rule, dnat(lab, spec)):
        noticed(lab, gate, spec)
        # The service's source is the outer address, which the tunnel does not have.
        with nothing_in_clear(lab, esp=False):
            report = held(lab, gate, "tcp-client", "--limit", "2", hold="1s")
        assert report["error"] is not None
        assert report["errnos"].keys() <= {"ETIMEDOUT", "EHOSTUNREACH", "EPERM"}
    wait_until(lambda: "becomes" not in why(gate), "its end is not noticed")


def test_losing_the_backends_sa_closes_the_service(lab: Lab, gate: Gated) -> None:
    spec = load_connection(lab, gate, "transport")
    with rules(lab, dnat(lab, spec)):
        noticed(lab, gate, spec)
        assert held(lab, gate, "tcp-client")["error"] is None
        wait_until(lambda: "is allowed" in why(gate), "the service is not live")
        lab.drop_ike()
        lab.a.namespace.flush_xfrm(policies=False)
        wait_until(lambda: "is refused" in why(gate), "the service is still live")
        with nothing_in_clear(lab, esp=False):
            report = held(lab, gate, "tcp-client", "--limit", "1", hold="1s")
        assert report["error"] is not None
