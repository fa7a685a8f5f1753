"""charon with other ports than 500 and 4500, and ESP in UDP, with charon itself gated.

Transport mode protects everything between the hosts' addresses, so IKE and ESP in UDP are packets
to a protected peer as well: only what they are lets them pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ipsecgate.lab.capture import Captured
from ipsecgate.lab.endpoints import Report
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.host import Host
from ipsecgate.lab.hosts import MODES, ConnSpec, Lab
from tests.until import wait_until

PORT = 7190
DATAGRAMS = 50


@dataclass(frozen=True)
class Ports:
    """Settings of both charons, and of their connection; `natt` are the ports of NAT traversal."""

    a: str = ""
    b: str = ""
    options: dict[str, str] = field(default_factory=dict)
    natt: frozenset[int] = frozenset({4500})


OTHERS = "port = 1500\nport_nat_t = 4600"
FORCED = {"encap": "yes"}
CASES = {
    "forced": Ports(options=FORCED),
    "random": Ports(a="port = 0\nport_nat_t = 0", options=FORCED),
    "random-nat-t": Ports(a="port_nat_t = 0", options=FORCED),
    "others": Ports(OTHERS, OTHERS, {"remote_port": "4600"}, frozenset({1500, 4600})),
    # From port 500, charon would send without RFC 3948's marker.
    "peers": Ports(
        "", OTHERS, {"local_port": "4500", "remote_port": "4600"}, frozenset({4500, 4600})
    ),
}


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-ports") as lab:
        lab.warm_up(families=(4,))
        lab.b.serve("tcp-server", PORT)
        yield lab


@pytest.fixture(scope="module")
def userspace_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-ports-tun", libipsec=True) as lab:
        lab.b.serve("tcp-server", PORT)
        yield lab


def start(lab: Lab, host: Host, settings: str, cgroup: Path | None) -> None:
    host.charon.configure(settings)
    host.charon.stop()
    lab.restart(host, cgroup)


def loaded(lab: Lab, gate: Gated, spec: ConnSpec, ports: Ports) -> None:
    """Start both charons with these settings, that of host a in the gated cgroup, and load."""
    start(lab, lab.a, ports.a, gate.cgroup)
    start(lab, lab.b, ports.b, None)
    lab.natt_ports = set(ports.natt)
    lab.load(spec)
    pid = lab.a.charon.pid
    wait_until(
        lambda: f"connected to the IKE daemon, pid {pid}" in gate.log.read_text(), "not seen"
    )
    gate.wait_policy(spec.name)


def connect(lab: Lab, gate: Gated, spec: ConnSpec, *options: str) -> Report:
    options = ("--retry", "EPERM,EHOSTUNREACH", *options)
    return lab.a.client(
        "tcp-client", lab.b.address(spec), PORT, *options, cgroup=gate.cgroup
    ).result()


def sent(seen: Captured) -> list[object]:
    return [packet for packet in seen.clear if packet.sender == "a"]


def opens_and_closes(lab: Lab, gate: Gated, spec: ConnSpec) -> None:
    """Refused, then protected; and refused again when the SA is gone; nothing in clear."""
    before = gate.reasons()
    with lab.b.serve("udp-server", PORT) as server, lab.capture() as capture:
        report = connect(lab, gate, spec)
        lab.a.client(
            *("udp-client", lab.b.address(spec), PORT, "--count", str(DATAGRAMS)),
            cgroup=gate.cgroup,
        ).result()
        received = server.report(DATAGRAMS, 5)
        seen = capture.stop()
    assert report["error"] is None, gate.log.read_text()
    assert report["errnos"].keys() <= {"EPERM", "EHOSTUNREACH"}
    assert "EPERM" in report["errnos"]
    assert received["distinct"] == DATAGRAMS
    assert len(seen.esp) > DATAGRAMS
    assert not sent(seen)
    blocked = {name: count - before[name] for name, count in gate.reasons().items()}
    assert not blocked["block_clear"], "IKE or ESP was blocked"

    lab.let_tcp_close()
    with lab.capture() as capture:
        lab.b.charon.unload(spec.name)
        lab.a.charon.drop_all()
        wait_until(lab.a.charon.idle, "charon keeps its SAs")
        report = connect(lab, gate, spec, "--limit", "1")
        assert report["error"] == "limit"
        assert not sent(capture.stop())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ports", CASES.values(), ids=CASES)
def test_ike_and_esp_pass_at_any_port(lab: Lab, cache: Path, ports: Ports, mode: str) -> None:
    spec = ConnSpec(f"ports-{mode}", mode, options=ports.options)
    with Gated(lab, cache=cache) as gate:
        loaded(lab, gate, spec, ports)
        opens_and_closes(lab, gate, spec)


@pytest.mark.parametrize("ports", [CASES[name] for name in ("random", "others")])
def test_userspace_esp_works_at_any_port(userspace_lab: Lab, cache: Path, ports: Ports) -> None:
    lab = userspace_lab
    lab.reset()
    spec = ConnSpec("ports-tun", "tunnel", options=ports.options)
    with Gated(lab, cache=cache) as gate:
        loaded(lab, gate, spec, ports)
        opens_and_closes(lab, gate, spec)
