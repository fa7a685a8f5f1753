"""The lab itself: what it builds, and how stock Linux behaves in it.

Seconds depend on the machine, counts do not. So the claims about stock Linux are counts (repeated
SYNs, lost datagrams); times are only compared with each other.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import statistics
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from vici.exception import CommandException

from ipsecgate.edges.host import cgroups
from ipsecgate.edges.kernel.probe import has_esp
from ipsecgate.lab.charon import HASTY
from ipsecgate.lab.endpoints import Server
from ipsecgate.lab.hosts import FAMILIES, MODES, ConnSpec, Lab, LabError, sweep
from ipsecgate.lab.netns import Namespace
from ipsecgate.lab.recorder import SCHED_DEADLINE
from ipsecgate.lab.xfrm_events import POLICY_ADDED

pytestmark = [
    pytest.mark.second_guest,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing: root"),
    pytest.mark.skipif(not has_esp(), reason="missing: ESP in the kernel"),
]

TCP_PORT, UDP_PORT = 7000, 7001
CASES = [
    pytest.param(mode, family, id=f"{mode}-v{family}") for mode in MODES for family in FAMILIES
]
CLOCKS = 0.02  # seconds: the capture stamps packets with another clock


@pytest.fixture(scope="module")
def warm_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-lab") as lab:
        lab.warm_up()
        yield lab


@pytest.fixture
def lab(warm_lab: Lab) -> Iterator[Lab]:
    yield warm_lab
    warm_lab.set_delay(0)
    warm_lab.reset()


@pytest.fixture(scope="module")
def tcp(warm_lab: Lab) -> Server:
    return warm_lab.b.serve("tcp-server", TCP_PORT)


@pytest.fixture(scope="module")
def udp(warm_lab: Lab) -> Server:
    return warm_lab.b.serve("udp-server", UDP_PORT)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_policy_everything_is_in_clear(lab: Lab, tcp: Server, family: int) -> None:
    for address in (lab.b.outer[family], lab.b.inner[family]):
        with lab.capture() as capture:
            report = lab.a.client("tcp-client", address, TCP_PORT).result()
            seen = capture.stop()
        assert report["echoed"], report
        assert report["errnos"] == {}
        assert [str(packet.daddr) for packet in seen.syns] == [str(address)]
        assert {packet.sender for packet in seen.clear} == {"a", "b"}
        assert not seen.esp
        assert not seen.ike


def test_the_recorder_runs_ahead_of_other_processes(lab: Lab) -> None:
    with lab.record():
        (process,) = multiprocessing.active_children()
        assert process.pid is not None
        scheduling = os.sched_getscheduler(process.pid) & ~os.SCHED_RESET_ON_FORK
    assert scheduling == SCHED_DEADLINE, "or its times are late"


@pytest.mark.parametrize(("mode", "family"), CASES)
def test_stock_linux_loses_the_first_syn(lab: Lab, tcp: Server, mode: str, family: int) -> None:
    spec = ConnSpec("stock", mode, family, start_action="trap")
    with lab.record() as recorder, lab.capture() as capture:
        lab.load(spec)
        before = lab.a.counters()
        first = lab.a.client("tcp-client", lab.b.address(spec), TCP_PORT).result()
        after = lab.a.counters()
        warm = lab.a.client("tcp-client", lab.b.address(spec), TCP_PORT).result()
        ready = recorder.wait("NEWSA", since=first["first"])
        assert ready is not None
        policy = recorder.wait(*POLICY_ADDED, since=ready)  # the trap is older
        lab.let_tcp_close()
        seen = capture.stop()
    assert first["echoed"], first
    assert warm["echoed"], warm
    assert after["TcpExtTCPSynRetrans"] - before["TcpExtTCPSynRetrans"] >= 1
    assert after["XfrmOutNoStates"] > before["XfrmOutNoStates"]
    assert lab.a.counters()["TcpExtTCPSynRetrans"] == after["TcpExtTCPSynRetrans"]
    assert lab.a.established() == lab.b.established() == ("stock",)
    # On the wire: IKE, then ESP from a, and not one packet in clear.
    assert seen.clear == ()
    assert len(seen.ike) >= 4
    assert len(seen.esp) >= 16
    assert seen.esp[0].sender == "a"
    # The first SYN that got through left long after the SA was up: at TCP's retransmission.
    assert policy is not None
    assert first["first"] < seen.ike[0].time < seen.ike[3].time < seen.esp[0].time
    assert seen.ike[3].time < ready < policy
    assert seen.esp[0].time < first["connected"] + CLOCKS
    assert first["connected"] - first["first"] > 0.9


@pytest.mark.parametrize("switches", [[], ["--connected"]], ids=["sendto", "connected"])
def test_stock_linux_loses_datagrams(lab: Lab, udp: Server, switches: list[str]) -> None:
    spec = ConnSpec("loss", start_action="trap")
    lab.load(spec)
    lab.set_delay(25)
    with lab.capture() as capture:
        # For four seconds, during which the SA is established.
        options = (*switches, "--rate", "200", "--count", "800")
        report = lab.a.client("udp-client", lab.b.address(spec), UDP_PORT, *options).result()
        counted = udp.report(expect=800, settle=0.5)
        seen = capture.stop()
    assert report["sent"] == 800
    assert report["errnos"] == {}, "the loss is silent"
    assert 0 < counted["distinct"] < 800
    assert seen.clear == ()
    assert len(seen.esp) == counted["distinct"]


def test_the_delay_applies_in_each_direction(lab: Lab, tcp: Server) -> None:
    lab.a.client("tcp-client", lab.b.bare[4], TCP_PORT).result()
    lab.let_tcp_close()
    lab.set_delay(40)
    with lab.capture() as capture:
        slow = lab.a.client("tcp-client", lab.b.bare[4], TCP_PORT).result()
        seen = capture.stop()
    lab.set_delay(0)
    quick = [lab.a.client("tcp-client", lab.b.bare[4], TCP_PORT).result() for _ in range(3)]
    took = slow["connected"] - slow["first"]
    assert took >= 0.08
    assert min(each["connected"] - each["first"] for each in quick) < took
    # Packets are stamped when they enter the path: the SYN at once, the answer one delay later.
    syn, answer = seen.clear[:2]
    assert (syn.sender, answer.sender) == ("a", "b")
    assert slow["first"] < syn.time < slow["connected"] - 0.04
    assert answer.time - syn.time >= 0.04


def test_each_packet_has_its_own_time_stamp(lab: Lab, udp: Server) -> None:
    with lab.capture() as capture:
        report = lab.a.client("udp-client", lab.b.bare[4], UDP_PORT, "--count", "50").result()
        assert udp.report(expect=50, settle=5)["distinct"] == 50
        times = [packet.time for packet in capture.stop().clear]
    assert len(times) == 50
    assert report["first"] < times[0]
    assert times[-1] < report["finished"]
    # Each packet is stamped when it is sent, not when the capture reads a batch.
    assert statistics.median(b - a for a, b in itertools.pairwise(times)) > 0.0005


def test_an_unprotected_address_needs_no_ike(lab: Lab, tcp: Server) -> None:
    for family in FAMILIES:
        lab.load(ConnSpec("trap", "transport", family, start_action="trap"))
        with lab.capture() as capture:
            bare = lab.a.client("tcp-client", lab.b.bare[family], TCP_PORT).result()
            seen = capture.stop()
        assert bare["echoed"], bare
        assert len(seen.syns) == 1
        assert not seen.ike
    assert lab.a.established() == ()


def test_several_connections_exist_side_by_side_and_reset_removes_them(
    lab: Lab, tcp: Server
) -> None:
    for mode in MODES:
        for family in FAMILIES:
            lab.load(ConnSpec(f"{mode}{family}", mode, family))
            lab.a.charon.initiate(f"{mode}{family}")
    assert len(lab.a.established()) == 4
    lab.reset()
    assert lab.a.established() == lab.b.established() == ()
    state = lab.a.run(["ip", "xfrm", "state"]).stdout
    policy = lab.a.run(["ip", "xfrm", "policy", "list", "nosock"]).stdout
    assert (state, policy) == ("", "")


def test_after_a_reset_nothing_is_sent_in_clear(lab: Lab, tcp: Server) -> None:
    lab.set_delay(30)
    lab.load(ConnSpec("last"))
    lab.a.charon.initiate("last")
    with lab.capture() as capture:
        assert lab.a.client("tcp-client", lab.b.outer[4], TCP_PORT).result()["echoed"]
        lab.reset()
        time.sleep(0.3)
        assert capture.stop().clear == ()


def test_esp_in_udp_is_esp(lab: Lab, tcp: Server) -> None:
    lab.load(ConnSpec("encap", options={"encap": "yes"}))
    lab.a.charon.initiate("encap")
    with lab.capture() as capture:
        assert lab.a.client("tcp-client", lab.b.outer[4], TCP_PORT).result()["echoed"]
        seen = capture.stop()
    assert seen.clear == ()
    assert {packet.dport for packet in seen.esp} == {4500}


def test_a_wrong_key_fails_and_reset_restores_it(lab: Lab) -> None:
    lab.break_psk()
    lab.load(ConnSpec("key"))
    with pytest.raises(CommandException):
        lab.a.charon.initiate("key")
    assert "AUTH_FAILED" in lab.a.charon.log.read_text()
    lab.reset()
    lab.load(ConnSpec("key"))
    lab.a.charon.initiate("key")
    assert lab.a.established() == ("key",)


def test_a_silent_peer_answers_nothing_until_reset(lab: Lab) -> None:
    lab.a.charon.configure(HASTY)
    lab.drop_ike()
    lab.load(ConnSpec("silent"))
    with lab.capture() as capture:
        with pytest.raises(CommandException):
            lab.a.charon.initiate("silent", timeout=60)
        seen = capture.stop()
    lab.a.charon.configure("")
    assert {packet.sender for packet in seen.ike} == {"a"}
    assert len(seen.ike) == 2, "one request and one retransmission"
    lab.reset()
    lab.load(ConnSpec("silent"))
    lab.a.charon.initiate("silent")


def test_a_killed_charon_leaves_its_sas(lab: Lab) -> None:
    lab.load(ConnSpec("kill"))
    lab.a.charon.initiate("kill")
    lab.a.charon.kill()
    assert lab.a.run(["ip", "xfrm", "state"]).stdout.count("proto esp") == 2
    lab.restart(lab.a)
    assert lab.a.established() == ()
    lab.reset()
    assert lab.a.run(["ip", "xfrm", "state"]).stdout == ""


def test_a_process_runs_in_its_cgroup_or_not_at_all(lab: Lab) -> None:
    good, closed = lab.cgroup("app"), lab.cgroup("domain/closed")
    said = lab.a.run(["cat", "/proc/self/cgroup"], cgroup=good).stdout
    assert said.endswith(f"{good.relative_to(cgroups.root())}\n")
    # A sibling of a threaded cgroup accepts no process: joining fails with EOPNOTSUPP.
    (lab.cgroup("domain/threaded") / "cgroup.type").write_text("threaded")
    refused = lab.a.run(["echo", "ran"], cgroup=closed, check=False)
    assert refused.returncode != 0
    assert "ran" not in refused.stdout


def test_a_second_lab_with_the_same_prefix_is_refused(lab: Lab) -> None:
    with pytest.raises(LabError, match="is open"), Lab(lab.prefix):
        pass


def test_labs_that_start_together_remove_what_a_dead_one_left() -> None:
    prefix = "ipsecgate-test-left"
    with subprocess.Popen(["true"]) as dead:
        pass
    names = [f"{prefix}-{dead.pid}-{number}" for number in range(100)]
    left = [Namespace(name).path for name in names] + [cgroups.root() / name for name in names]
    for group in left[len(names) :]:
        group.mkdir()
    with ThreadPoolExecutor() as pool:
        list(pool.map(sweep, [prefix] * 3))
    assert [path for path in left if path.exists()] == []
