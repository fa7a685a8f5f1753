"""The gate with userspace ESP: strongSwan's kernel-libipsec behind a TUN device.

XFRM shows nothing here; only the last test needs ESP in the kernel. Beside the tunnel the hosts
have another route to each other's networks, so a packet that the gate lets through too early or too
late is on the wire in clear, where the capture sees it.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ipsecgate.core.model.flow import UDP
from ipsecgate.edges.holding import seccomp
from ipsecgate.lab.capture import Captured
from ipsecgate.lab.endpoints import Report
from ipsecgate.lab.frames import Packet
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.host import Host
from ipsecgate.lab.hosts import FAMILIES, ConnSpec, Lab
from ipsecgate.lab.recorder import SO_RCVBUFFORCE
from tests.system.caller import called_again, hammering
from tests.system.connections import load_connection
from tests.until import wait_until

pytestmark = pytest.mark.second_guest

PORT = 7300
DATAGRAMS = 200
# ESP passes through two processes that may wait for the processor; nothing may be lost meanwhile.
# The receive buffer of a socket in bytes (socket(7) doubles it), the queue of a device in packets.
BUFFER, QUEUE = 8 << 20, "20000"
INET = (socket.AF_INET, socket.AF_INET6)


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-libipsec", libipsec=True) as lab:
        lab.b.serve("tcp-server", PORT)
        yield lab


def connect(lab: Lab, gate: Gated, spec: ConnSpec, *options: str) -> Report:
    """Connect from host a, retrying on EPERM; the options may set another limit."""
    return lab.a.client(
        "tcp-client", lab.b.address(spec), PORT, *options, cgroup=gate.cgroup
    ).result()


def connected(report: Report) -> bool:
    return report["error"] is None and report["echoed"]


def negotiation(gate: Gated, spec: ConnSpec) -> dict[str, Any]:
    found: list[dict[str, Any]] = gate.ask()["negotiations"]
    named = f"{spec.name}/{spec.child_name}"
    return next(n for n in found if n["child"] == named)


def attempts(gate: Gated, spec: ConnSpec) -> int:
    return int(negotiation(gate, spec)["attempts"])


def queue_all(lab: Lab) -> None:
    """Enlarge the queues of both devices and of all UDP sockets on both hosts."""
    for side in (lab.a, lab.b):
        side.run(["ip", "link", "set", "ipsec0", "txqueuelen", QUEUE])
        enlarged = sum(enlarge_buffers(pid) for pid in side.namespace.pids())
        assert enlarged >= 2, "charon has one for each family"


def enlarge_buffers(pid: int) -> int:
    """Give every UDP socket of a process room for `BUFFER`; return how many it has."""
    found = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if not str(entry.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=seccomp.copy_descriptor(pid, int(entry.name))) as one:
                if one.family in INET and one.type == socket.SOCK_DGRAM:
                    one.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
                    found += 1
    return found


def refused_and_nothing_in_clear(lab: Lab, gate: Gated, spec: ConnSpec) -> Captured:
    with lab.capture() as capture:
        report = connect(lab, gate, spec, "--limit", "0.5")
        seen = capture.stop()
    assert report["error"] == "limit"
    assert set(report["errnos"]) <= {"EPERM", "EHOSTUNREACH"}
    assert not ours(seen)
    return seen


def ours(seen: Captured) -> list[Packet]:
    """Return what a sent in clear. Host b has no gate, and repeats what a no longer receives."""
    return [packet for packet in seen.clear if packet.sender == "a"]


# --- opening -------------------------------------------------------------------------


def test_userspace_esp_is_detected_and_shown(lab: Lab, gate: Gated) -> None:
    spec = load_connection(lab, gate, start_action="none")
    assert connected(connect(lab, gate, spec))
    status = gate.status()
    assert status["sa_source"] == "vici"
    assert [(sa["child"], sa["peer"]) for sa in status["sas"]] == [
        (f"{spec.name}/{spec.child_name}", str(lab.b.outer[4]))
    ]
    assert {p["coverage"] for p in status["policies"] if p["name"].startswith(spec.name)} == {
        "covered"
    }
    checked = {f["name"]: f for f in json.loads(gate.cli("--json", "check").stdout)}
    assert checked["esp"]["state"] == "ok"
    assert "not needed" in checked["esp"]["found"]
    assert "SA source: vici" in gate.cli("status").stdout
    assert status["sas"][0]["spi"] in gate.cli("sas").stdout


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_the_first_connection_loses_nothing(
    lab: Lab, gate: Gated, protocol: str, family: int
) -> None:
    lab.set_delay(25)
    spec = load_connection(lab, gate, family=family, start_action="none")
    reasons, before = gate.reasons(), segments(lab)
    count = ("--count", str(DATAGRAMS), "--rate", "1000") if protocol == "udp" else ()
    with lab.b.serve(f"{protocol}-server", PORT + 1) as server, lab.capture() as capture:
        queue_all(lab)
        report = lab.a.client(
            f"{protocol}-client", lab.b.address(spec), PORT + 1, *count, cgroup=gate.cgroup
        ).result()
        received = server.report(DATAGRAMS if count else 0, 5 if count else 0)
        seen = capture.stop()
    assert report["error"] is None
    assert set(report["errnos"]) == {"EPERM"}, "it was refused first, so the gate had to open"
    assert seen.esp
    assert not seen.clear
    # A SYN is also repeated if its answer was a second late.
    wait_until(lambda: segments(lab) == before, "a segment was lost")
    if count:
        assert received["distinct"] == DATAGRAMS
    counted = {name: gate.reasons()[name] - reasons[name] for name in reasons}
    taken = counted["allow_covered"] + counted["allow_associated"]
    assert taken == (DATAGRAMS if count else 1)


def segments(lab: Lab) -> int:
    """Return how many more TCP segments host a sent than host b received."""
    return lab.a.counters()["TcpOutSegs"] - lab.b.counters()["TcpInSegs"]


def sends(gate: Gated) -> None:
    """Wait until a connected socket has sent for a while."""
    before = gate.reasons()["allow_associated"]
    wait_until(lambda: gate.reasons()["allow_associated"] > before + 100, "it does not send")


def spis(lab: Lab) -> set[bytes]:
    """Return the outbound SPIs of host a, without those that a rekey has replaced."""
    with lab.a.charon.session() as session:
        ike_sas = [sa for each in session.list_sas() for sa in each.values()]
    children = [child for sa in ike_sas for child in sa["child-sas"].values()]
    return {child["spi-out"] for child in children if child["state"] == b"INSTALLED"}


def rekey(lab: Lab, side: Host, spec: ConnSpec) -> None:
    """Let one side rekey, and wait until the SA has been replaced."""
    before = spis(lab)
    side.charon.rekey(spec.child_name)
    wait_until(lambda: bool(found := spis(lab)) and found.isdisjoint(before), "not rekeyed")


def test_a_rekey_has_no_gap(lab: Lab, gate: Gated) -> None:
    spec = load_connection(lab, gate, start_action="none")
    assert connected(connect(lab, gate, spec))
    with lab.b.serve("udp-server", PORT + 1) as server, lab.capture() as capture:
        queue_all(lab)
        client = lab.a.client(
            *("udp-client", lab.b.address(spec), PORT + 1),
            *("--count", "1000000", "--rate", "250", "--limit", "150"),
            cgroup=gate.cgroup,
        )
        sends(gate)
        for side in (lab.a, lab.b):
            rekey(lab, side, spec)
            sends(gate)
        client.process.send_signal(signal.SIGALRM)  # its limit has passed
        report = client.result()
        received = server.report(report["sent"], 5)
        seen = capture.stop()
    assert report["error"] == "limit"
    assert report["errnos"] == {}
    # The signal may arrive after it has sent a datagram and before it has counted it.
    assert received["distinct"] - report["sent"] in (0, 1)
    assert not seen.clear


def test_a_restarted_controller_refuses_no_covered_flow(lab: Lab, gate: Gated) -> None:
    spec = load_connection(lab, gate, start_action="none")
    assert connected(connect(lab, gate, spec))
    gate.kill()
    assert connect(lab, gate, spec)["errnos"] == {}
    with hammering(lab.a.namespace.path, gate.cgroup, "tcp", str(lab.b.inner[4]), PORT) as results:
        gate.start()
        called_again(results, 100)
    lab.let_tcp_close()  # with the SA: host b, ungated, would repeat its SYN-ACKs in clear
    assert len(results) > 100
    assert set(results) == {"EINPROGRESS"}


# --- closing -------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["a", "b"])
@pytest.mark.parametrize("what", ["child", "ike"])
def test_a_terminated_sa_closes_the_flow_and_the_next_call_negotiates_again(
    lab: Lab, gate: Gated, side: str, what: str
) -> None:
    spec = load_connection(lab, gate, start_action="none")
    assert connected(connect(lab, gate, spec))
    lab.let_tcp_close()  # host b has no gate
    before = attempts(gate, spec)
    with lab.capture() as capture:
        with getattr(lab, side).charon.session() as session:
            list(session.terminate({what: spec.name}))
        report = connect(lab, gate, spec)
        seen = capture.stop()
    assert connected(report)
    assert report["errnos"].keys() == {"EPERM"}
    assert not seen.clear
    assert attempts(gate, spec) == before + 1


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_the_flow_closes_when_the_daemon_ends_and_opens_when_it_returns(
    lab: Lab, gate: Gated, end: str
) -> None:
    spec = load_connection(lab, gate, start_action="none")
    assert connected(connect(lab, gate, spec))
    lab.let_tcp_close()
    ending: Callable[[], None] = getattr(lab.a.charon, end)
    ending()
    assert "ipsec0" not in lab.a.run(["ip", "link"]).stdout, "its device went with it"
    refused_and_nothing_in_clear(lab, gate, spec)
    wait_until(
        lambda: any("strongSwan" in error["text"] for error in gate.ask()["errors"]),
        "it says nothing",
    )
    lab.restart(lab.a)
    time.sleep(1)
    refused_and_nothing_in_clear(lab, gate, spec)  # the saved children are still protected
    lab.load(spec)
    lab.b.charon.drop_all()
    with lab.capture() as capture:
        assert connected(connect(lab, gate, spec))
        assert not ours(capture.stop())


def test_a_removed_route_closes_the_flow_and_is_restored(lab: Lab, gate: Gated) -> None:
    """The SA is up, but the flow would leave outside the tunnel."""
    spec = load_connection(lab, gate, start_action="none")
    assert connected(connect(lab, gate, spec))
    lab.let_tcp_close()
    with lab.capture() as capture:
        lab.a.run(["ip", "route", "flush", "table", "220"])
        wait_until(lambda: negotiation(gate, spec)["state"] == "uncovered", "it stays covered")
        # Check this before a refusal makes the gate delete the SA and negotiate a new one.
        assert len(lab.a.established()) == 1
        report = connect(lab, gate, spec, "--limit", "0.3")
        assert report["error"] == "limit"
        assert connected(connect(lab, gate, spec, "--retry", "EPERM,EHOSTUNREACH"))
        assert not capture.stop().clear


ENDS: dict[str, Callable[[Lab, str], None]] = {
    "a terminates": lambda lab, child: lab.a.charon.terminate(child),
    "b terminates": lambda lab, child: lab.b.charon.terminate(child),
    "SIGTERM": lambda lab, _child: lab.a.charon.stop(),
    "SIGKILL": lambda lab, _child: lab.a.charon.kill(),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_collapse_under_load_lets_nothing_out(
    lab: Lab, gate: Gated, end: Callable[[Lab, str], None]
) -> None:
    """The route into the tunnel vanishes first, and the next best route leads out in clear."""
    spec = load_connection(lab, gate, start_action="none")
    assert connected(connect(lab, gate, spec, "--retry", "EPERM,EHOSTUNREACH"))
    space, to = lab.a.namespace.path, str(lab.b.address(spec))
    with (
        lab.capture() as capture,
        hammering(space, gate.cgroup, "tcp", to, PORT) as tcp,
        hammering(space, gate.cgroup, "sendto", to, PORT) as udp,
    ):
        for results in (tcp, udp):
            called_again(results, 100)
        end(lab, spec.child_name)
        wait_until(lambda: "EPERM" in {*tcp, *udp}, "no call was refused")
        for results in (tcp, udp):
            called_again(results, 100)
        seen = capture.stop()
    assert "EINPROGRESS" in tcp
    assert "" in udp
    # Ignore what the kernel of host a answers by itself: "port unreachable" for ESP to a killed
    # charon, RST or ACK for segments to a closed socket.
    sent = [packet for packet in seen.clear if str(packet.daddr) == to]
    assert [packet for packet in sent if packet.is_syn or packet.proto == UDP] == []


# --- a wrong configuration -------------------------------------------------------------


def test_configured_xfrm_opens_nothing_with_userspace_esp(lab: Lab, cache: Path) -> None:
    with Gated(lab, policies='sa_source = "xfrm"\n', cache=cache) as gate:
        spec = load_connection(lab, gate, start_action="none")
        lab.a.charon.initiate(spec.child_name)
        refused_and_nothing_in_clear(lab, gate, spec)
        assert gate.status()["sa_source"] == "xfrm"
        assert "but strongSwan does ESP" in gate.log.read_text()


def test_configured_vici_opens_nothing_with_kernel_esp(cache: Path) -> None:
    with Lab("ipsecgate-test-kernel-esp") as lab:
        lab.warm_up(("tunnel",), (4,))
        lab.b.serve("tcp-server", PORT)
        with Gated(lab, policies='sa_source = "vici"\n', cache=cache) as gate:
            spec = load_connection(lab, gate, start_action="none")
            lab.a.charon.initiate(spec.child_name)
            refused_and_nothing_in_clear(lab, gate, spec)
            assert gate.status()["sa_source"] == "vici"
        with Gated(lab, cache=cache) as gate:
            gate.wait_policy(spec.name)
            assert gate.status()["sa_source"] == "xfrm"
            assert connected(connect(lab, gate, spec))
