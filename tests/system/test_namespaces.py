"""Gated processes in other network namespaces, on real ESP: through the host's SPD, or around it.

The evidence is a capture between the hosts, the kernel's counter of retransmissions in the
namespace of the client, and what the calls return.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipsecgate.lab import traffic
from ipsecgate.lab.capture import Captured
from ipsecgate.lab.endpoints import Client, Report
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import FAMILIES, ConnSpec, Lab
from tests.system.boxes import Box, box, masquerade
from tests.until import wait_until

PORT = 7400
NOTICED = 6.0  # seconds: nothing notifies of a change by iptables-legacy
SUBNET = {4: "10.88.0.0/24", 6: "fd88::/64"}


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-namespaces") as lab:
        lab.warm_up()
        lab.b.serve("tcp-server", PORT)
        lab.b.serve("udp-server", PORT)
        yield lab


def load(lab: Lab, gate: Gated, spec: ConnSpec) -> None:
    lab.load(spec)
    gate.wait_policy(spec.name)


def transport(family: int = 4, **options: Any) -> ConnSpec:
    """The masqueraded flow's tunnel: between the hosts' own addresses."""
    return ConnSpec(f"masqueraded-{family}", "transport", family, start_action="trap", **options)


def routed(family: int = 4) -> ConnSpec:
    """The tunnel of the box's subnet, which keeps its addresses."""
    return ConnSpec(
        f"routed-{family}", "tunnel", family, start_action="trap", local_ts=(SUBNET[family],)
    )


def argv(lab: Lab, spec: ConnSpec, *options: str, role: str = "tcp-client") -> list[str]:
    to = str(lab.b.address(spec))
    return traffic.command(role, "--to", to, "--port", str(PORT), *options)


def call(
    lab: Lab, gate: Gated, there: Box, spec: ConnSpec, *options: str, role: str = "tcp-client"
) -> Report:
    """Connect from the box, in the gated cgroup; retry while it is refused."""
    pipe = subprocess.PIPE
    process = there.popen(argv(lab, spec, *options, role=role), gate.cgroup, stdout=pipe)
    return Client(process).result()


def held(
    lab: Lab, gate: Gated, there: Box, spec: ConnSpec, *options: str, role: str = "tcp-client"
) -> Report:
    """Connect from the box once, under `ipsecgate exec`."""
    command = [*there.launcher(), *argv(lab, spec, *options, role=role)]
    pipe = subprocess.PIPE
    return Client(lab.a.popen(gate.exec_argv(*command), stdout=pipe)).result()


@contextlib.contextmanager
def watched(lab: Lab, there: Box) -> Iterator[list[Captured]]:
    """Capture between the hosts; no SYN of the box may be sent again."""
    seen: list[Captured] = []
    with lab.capture() as capture:
        yield seen
        time.sleep(0.1)
        seen.append(capture.stop())
    assert there.namespace.counters()["TcpExtTCPSynRetrans"] == 0


def connected(report: Report) -> bool:
    return report["error"] is None and bool(report["echoed"])


def refused(report: Report) -> bool:
    """Tell whether every attempt was refused until the limit."""
    errors: dict[str, int] = report["errnos"]
    return report["error"] == "limit" and errors.keys() == {"EPERM"}


def reason(gate: Gated, name: str) -> int:
    return gate.reasons()[name]


CASES = ["masqueraded", "routed"]


@pytest.fixture(params=[(case, family) for case in CASES for family in FAMILIES], ids=str)
def through(
    request: pytest.FixtureRequest, lab: Lab, gate: Gated
) -> Iterator[tuple[Box, ConnSpec]]:
    """A box whose packets come through the host, and the connection that protects its flow."""
    case, family = request.param
    spec = {"masqueraded": transport, "routed": routed}[case](family)
    with contextlib.ExitStack() as stack:
        there = stack.enter_context(box(lab.a.namespace, "bridge"))
        if case == "masqueraded":
            stack.enter_context(masquerade(lab.a.namespace, family))
        load(lab, gate, spec)
        lab.set_delay(25)
        yield there, spec


@pytest.mark.parametrize("role", ["tcp-client", "udp-client"])
def test_the_first_call_is_held(
    lab: Lab, gate: Gated, through: tuple[Box, ConnSpec], role: str
) -> None:
    there, spec = through
    refused = reason(gate, "refuse_netns")
    with watched(lab, there) as seen:
        report = held(lab, gate, there, spec, role=role)
    assert report["error"] is None, (report, gate.log.read_text())
    assert report["errnos"] == {}
    assert seen[0].ike
    assert seen[0].esp
    assert not seen[0].clear
    assert reason(gate, "refuse_netns") == refused


def test_refused_calls_are_let_go_once_the_sa_is_up(
    lab: Lab, gate: Gated, through: tuple[Box, ConnSpec]
) -> None:
    there, spec = through
    with watched(lab, there) as seen:
        report = call(lab, gate, there, spec)
    assert connected(report), (report, gate.log.read_text())
    assert report["errnos"].keys() == {"EPERM"}
    assert seen[0].esp
    assert not seen[0].clear


def test_they_are_refused_again_without_the_sa(
    lab: Lab, gate: Gated, through: tuple[Box, ConnSpec]
) -> None:
    there, spec = through
    assert connected(call(lab, gate, there, spec))
    lab.let_tcp_close()  # else the other host, which has no gate, repeats its FIN
    lab.drop_ike()
    lab.a.charon.drop_all()
    wait_until(lambda: not lab.a.established(), "the SA is still there")
    with watched(lab, there) as seen:
        report = call(lab, gate, there, spec, "--limit", "0.5")
    assert refused(report)
    assert not seen[0].clear
    assert not seen[0].esp


def test_outside_the_gated_cgroup_nothing_changes(lab: Lab, gate: Gated) -> None:
    with box(lab.a.namespace, "bridge") as there, masquerade(lab.a.namespace):
        load(lab, gate, transport())
        total = sum(gate.reasons().values())
        pipe = subprocess.PIPE
        to = str(lab.b.bare[4])
        command = traffic.command("tcp-client", "--to", to, "--port", str(PORT))
        assert connected(Client(there.popen(command, stdout=pipe)).result())
        assert sum(gate.reasons().values()) == total


def test_a_masquerade_to_an_address_that_no_sa_protects_is_refused(lab: Lab, gate: Gated) -> None:
    """The tunnel is up for the box's own addresses, but the host changes them."""
    with box(lab.a.namespace, "bridge") as there:
        spec = routed()
        load(lab, gate, spec)
        assert connected(call(lab, gate, there, spec))
        with masquerade(lab.a.namespace):
            time.sleep(NOTICED)
            with watched(lab, there) as seen:
                report = call(lab, gate, there, spec, "--limit", "0.5")
            assert refused(report)
            assert not seen[0].clear
            assert not seen[0].esp
        time.sleep(NOTICED)
        assert connected(call(lab, gate, there, spec))


def test_with_the_host_floor_only_routed_containers_connect(lab: Lab, cache: Path) -> None:
    """The floor would drop a masqueraded one's SYN before its source is translated."""
    with (
        Gated(lab, policies='floor = "xfrm-block"\n', cache=cache) as gate,
        box(lab.a.namespace, "bridge") as there,
    ):
        spec = routed()
        load(lab, gate, spec)
        with watched(lab, there) as seen:
            assert connected(call(lab, gate, there, spec)), gate.log.read_text()
        assert not seen[0].clear
        load(lab, gate, transport())
        lab.a.charon.initiate(transport().child_name)
        with masquerade(lab.a.namespace), watched(lab, there) as seen:
            time.sleep(NOTICED)
            assert refused(call(lab, gate, there, transport(), "--limit", "0.5"))
        assert not seen[0].clear
        assert not seen[0].esp


def test_the_hosts_own_address_is_exempt(lab: Lab, gate: Gated) -> None:
    """Although it lies in a network that must be protected: its packets do not leave the host."""
    with box(lab.a.namespace, "bridge") as there:
        load(
            lab,
            gate,
            ConnSpec("wide", "tunnel", 4, local_ts=(SUBNET[4],), remote_ts=("10.0.0.0/8",)),
        )
        lab.drop_ike()  # an SA would take the replies, which go to 10.0.0.0/8, too
        with lab.a.serve("tcp-server", PORT + 1), watched(lab, there) as seen:
            for bound in ((), ("--bind", there.address[4])):
                words = ("--to", "10.88.0.1", "--port", str(PORT + 1), *bound)
                command = traffic.command("tcp-client", *words)
                process = there.popen(command, gate.cgroup, stdout=subprocess.PIPE)
                report = Client(process).result()
                assert connected(report), (report, gate.log.read_text())
        assert not seen[0].clear


@pytest.mark.parametrize(
    ("kind", "mode"), [("macvlan", ""), ("ipvlan", "l2"), ("ipvlan", "l3"), ("ipvlan", "l3s")]
)
def test_around_the_host_it_is_refused_and_said_why(
    lab: Lab, gate: Gated, kind: str, mode: str
) -> None:
    """Although an SA is up that has the addresses of its flow."""
    spec = transport(remote_ts=(str(lab.b.outer[4]),), local_ts=("192.0.2.0/24",))
    with box(lab.a.namespace, kind, mode=mode) as there:
        load(lab, gate, spec)
        lab.a.charon.initiate(spec.child_name)
        with watched(lab, there) as seen:
            report = call(lab, gate, there, spec, "--limit", "1")
        assert refused(report)
        assert not seen[0].clear
        assert reason(gate, "refuse_outside")
        sleeping = there.popen(["sleep", "60"], gate.cgroup)
        why = gate.cli("why", "--pid", str(sleeping.pid), f"{lab.b.outer[4]}:{PORT}", check=False)
        words = " ".join(why.stdout.split())
        assert f"its packets leave by {kind} eth0, around this host's SPD" in words
        assert "only an SPD in that namespace can protect it" in words
        sleeping.kill()
        sleeping.wait()
