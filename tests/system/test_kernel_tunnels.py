"""Tunnels of the kernel's own over transport mode, with the whole host gated.

No process sends their packets, so no hook and no backstop sees them: the floor holds them back
until there is an SA. Their connections name a protocol or a port, and no other flow to that peer is
refused.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ipsecgate.lab.endpoints import Report
from ipsecgate.lab.frames import Packet
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.until import wait_until

pytestmark = pytest.mark.second_guest

PORT = 7170
NETWORK = "10.77.0.{}"
# The traffic selectors of a packet's two ends, without addresses.
TUNNELS = {
    "gre": ("[gre]", "[gre]"),
    "ipip": ("[4]", "[4]"),
    "vxlan": ("[udp]", "[udp/4789]"),
    "geneve": ("[udp]", "[udp/6081]"),
}


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-tunnels") as lab:
        lab.warm_up(("transport",), (4,))
        lab.b.serve("tcp-server", PORT)
        yield lab


def connections(lab: Lab, kind: str, start_action: str = "none") -> list[ConnSpec]:
    """Return the connections for a tunnel; for one over UDP two children, as OVN has them."""
    here, there = str(lab.a.outer[4]), str(lab.b.outer[4])
    near, far = TUNNELS[kind]
    return [
        ConnSpec(
            f"{kind}-{number}",
            start_action=start_action,
            local_ts=(here + one,),
            remote_ts=(there + other,),
        )
        for number, (one, other) in enumerate(dict.fromkeys([(near, far), (far, near)]))
    ]


@contextmanager
def tunnel(lab: Lab, kind: str) -> Iterator[None]:
    """Make the tunnel's devices on both hosts, with addresses of `NETWORK`."""
    extra = {"vxlan": "id 7 dstport 4789", "geneve": "id 7 dstport 6081"}.get(kind, "")
    for host in (lab.a, lab.b):
        ends = f"remote {lab.peer(host).outer[4]}"
        if kind != "geneve":
            ends = f"local {host.outer[4]} {ends}"
        address = NETWORK.format(1 if host is lab.a else 2)
        for words in (
            f"link add tunnel type {kind} {ends} {extra}",
            f"addr add {address}/24 dev tunnel",
            "link set tunnel up",
        ):
            host.run(["ip", *words.split()])
    try:
        yield
    finally:
        for host in (lab.a, lab.b):
            host.run(["ip", "link", "del", "tunnel"])


def connect(lab: Lab, to: object, *options: str) -> Report:
    return lab.a.client("tcp-client", to, PORT, *options).result()  # type: ignore[arg-type]


def connected(report: Report) -> bool:
    return report["error"] is None and report["echoed"]


def sent_in_clear(lab: Lab) -> tuple[Report, tuple[Packet, ...]]:
    """Try to connect through the tunnel for a while; return the report, and what was in clear."""
    with lab.capture() as capture:
        report = connect(lab, NETWORK.format(2), "--limit", "1.5")
        seen = capture.stop()
    return report, tuple(packet for packet in seen.clear if packet.sender == "a")


def waits(lab: Lab) -> bool:
    """Return whether the tunnel carries nothing, and nothing of it is in clear."""
    report, sent = sent_in_clear(lab)
    assert not sent
    return str(report["error"]) == "limit"


def has_floor(lab: Lab) -> bool:
    return "action block" in lab.a.run(["ip", "xfrm", "policy", "list", "dir", "out"]).stdout


@pytest.mark.parametrize("kind", TUNNELS)
def test_a_tunnel_waits_for_its_sa_and_nothing_else_does(lab: Lab, cache: Path, kind: str) -> None:
    specs = connections(lab, kind)
    with Gated(lab, host=True, cache=cache) as gate, tunnel(lab, kind):
        for spec in specs:
            lab.load(spec)
            gate.wait_policy(spec.name)
        wait_until(lambda: has_floor(lab), "there is no floor")
        assert waits(lab)
        for spec in specs:
            lab.a.charon.initiate(spec.child_name)
        with lab.capture() as capture:
            assert connected(connect(lab, NETWORK.format(2))), gate.log.read_text()
            seen = capture.stop()
        assert seen.esp
        assert not seen.clear

        other = connect(lab, lab.b.outer[4])
        assert connected(other), "no connection names this protocol or port"
        assert other["attempts"] == 1
        for spec in specs:
            lab.a.charon.terminate(spec.child_name)
        time.sleep(0.1)
        assert waits(lab), "its SA is gone"


@pytest.mark.parametrize("kind", ["gre", "ipip"])
def test_a_trap_starts_the_negotiation_for_a_tunnel(lab: Lab, cache: Path, kind: str) -> None:
    """The kernel drops the packets that ask for it, so the connection inside takes a moment."""
    specs = connections(lab, kind, "trap")
    with Gated(lab, host=True, cache=cache) as gate:
        for spec in specs:
            lab.load(spec)
            gate.wait_policy(spec.name)
        wait_until(lambda: has_floor(lab), "there is no floor")
        with lab.capture() as capture, tunnel(lab, kind):
            assert connected(connect(lab, NETWORK.format(2)))
            seen = capture.stop()
        assert seen.esp
        assert not [packet for packet in seen.clear if packet.sender == "a"]


def test_without_the_floor_a_tunnel_would_not_wait(lab: Lab, cache: Path) -> None:
    (spec,) = connections(lab, "gre")
    with Gated(lab, host=True, policies='floor = "none"\n', cache=cache) as gate:
        lab.load(spec)
        gate.wait_policy(spec.name)
        with tunnel(lab, "gre"):
            report, sent = sent_in_clear(lab)
            assert connected(report)
            assert sent
        words = " ".join(gate.cli("check", check=False).stdout.split())
        assert "tunnels and NFS of the kernel" in words, "check says what is not held back"


@pytest.mark.parametrize("how", [(), ("--connected",)], ids=["sendto", "connected"])
@pytest.mark.parametrize(
    ("sport", "dport", "refused"),
    [(0, 6081, True), (6081, 9000, True), (0, 9000, False), (9001, 9000, False)],
)
def test_only_flows_of_the_named_ports_need_an_sa(
    lab: Lab, gate: Gated, how: tuple[str, ...], sport: int, dport: int, refused: bool
) -> None:
    """Two children as OVN has them: to the peer's port 6081, and from one's own."""
    specs = connections(lab, "geneve")
    for spec in specs:
        lab.load(spec)
        gate.wait_policy(spec.name)
    bind = ("--bind", str(lab.a.outer[4]), "--local", str(sport)) if sport else ()
    with lab.b.serve("udp-server", dport) as server, lab.capture() as capture:
        client = lab.a.client(
            "udp-client", lab.b.outer[4], dport, *bind, *how, "--count", "10", cgroup=gate.cgroup
        )
        report = client.result()
        received = server.report(10, 5)
        seen = capture.stop()
    assert report["error"] is None
    assert received["distinct"] == 10
    assert ("EPERM" in report["errnos"]) is refused
    sent = [packet for packet in seen.clear if packet.sender == "a"]
    assert bool(sent) is not refused
