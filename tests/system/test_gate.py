"""The whole gate on two hosts with real IKE and real ESP.

The evidence is a capture between the hosts, the kernel's counter of retransmissions, and the
receiver's count of datagrams; never the gate's own status.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ipsecgate.cli.events import NEWS
from ipsecgate.lab import first_connection
from ipsecgate.lab.capture import Captured
from ipsecgate.lab.endpoints import Report
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import FAMILIES, MODES, ConnSpec, Lab
from tests.system.caller import Caller, called_again, hammering
from tests.system.connections import load_connection
from tests.system.strongswan import ike_sas
from tests.system.under_exec import stopped
from tests.until import wait_until

PORT = 7100
CASES = [case for case in first_connection.cases() if case.gated]


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-gate") as lab:
        lab.warm_up()
        lab.b.serve("tcp-server", PORT)
        yield lab


class Counted:
    """The counters of the hooks, counted from now."""

    def __init__(self, gate: Gated) -> None:
        self._gate = gate
        self._before = gate.reasons()

    def __getitem__(self, reason: str) -> int:
        return self._gate.reasons()[reason] - self._before[reason]

    def total(self) -> int:
        return sum(self._gate.reasons().values()) - sum(self._before.values())


def negotiation(gate: Gated, spec: ConnSpec) -> dict[str, Any]:
    found: list[dict[str, Any]] = gate.ask()["negotiations"]
    return next(n for n in found if n["child"] == f"{spec.name}/{spec.child_name}")


def connect(lab: Lab, gate: Gated, spec: ConnSpec, *options: str, gated: bool = True) -> Report:
    """Connect from host a, retrying on EPERM; the options may set another limit."""
    cgroup = gate.cgroup if gated else None
    client = lab.a.client("tcp-client", lab.b.address(spec), PORT, *options, cgroup=cgroup)
    return client.result()


def connected(report: Report) -> bool:
    return report["error"] is None and report["echoed"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_first_connection_loses_nothing(
    lab: Lab, gate: Gated, case: first_connection.Case
) -> None:
    lab.set_delay(25)
    counted = Counted(gate)
    outcome = first_connection.measure(lab, case, gate)
    assert outcome.error is None
    assert outcome.refused > 0, "it was refused first, so the gate had to open"
    assert outcome.esp_packets > 0
    assert outcome.clear_packets == 0
    assert outcome.syn_retransmissions == 0
    assert outcome.datagrams_lost in (None, 0)
    assert counted["refuse_uncovered"] + counted["refuse_no_source"] == outcome.refused
    taken = 1 if case.protocol == "tcp" else first_connection.DATAGRAMS
    assert counted["allow_covered"] + counted["allow_associated"] == taken


def refused_then_protected(lab: Lab, gate: Gated, spec: ConnSpec) -> None:
    """The first attempts are refused, one connects, and nothing of them is in clear."""
    with lab.capture() as capture:
        report = connect(lab, gate, spec)
        seen = capture.stop()
    assert connected(report)
    assert report["errnos"].keys() == {"EPERM"}
    assert not seen.clear
    assert seen.esp


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_trap_the_gate_starts_the_negotiation(
    lab: Lab, gate: Gated, mode: str, family: int
) -> None:
    """strongSwan has no policy in the kernel, so an open gate would mean packets in clear."""
    spec = load_connection(lab, gate, mode, family, start_action="none")
    refused_then_protected(lab, gate, spec)


def test_an_ike_sa_without_a_child_opens_nothing(lab: Lab, gate: Gated) -> None:
    """With RFC 6023 an IKE_SA may have no child; the first flow creates one."""
    spec = ConnSpec("childless", start_action="none", options={"childless": "force"})
    lab.load(spec)
    gate.wait_policy(spec.name)
    with lab.a.charon.session() as session:
        list(session.initiate({"ike": spec.name, "timeout": "30000"}))
    childless = ike_sas(lab.a)
    assert childless
    assert not lab.a.established()
    refused_then_protected(lab, gate, spec)
    assert ike_sas(lab.a) == childless


def test_a_flow_that_no_policy_names_is_untouched(lab: Lab, gate: Gated) -> None:
    load_connection(lab, gate)
    counted = Counted(gate)
    for family in FAMILIES:
        client = lab.a.client("tcp-client", lab.b.bare[family], PORT, cgroup=gate.cgroup)
        report = client.result()
        assert connected(report)
        assert report["attempts"] == 1
    assert counted["allow_default"] == counted.total() == len(FAMILIES)


def test_outside_the_cgroup_nothing_changes(lab: Lab, gate: Gated) -> None:
    spec = load_connection(lab, gate)
    counted = Counted(gate)
    report = connect(lab, gate, spec, gated=False)
    assert connected(report)
    assert report["errnos"] == {}
    assert counted.total() == 0


def test_many_flows_start_one_negotiation(lab: Lab, gate: Gated) -> None:
    spec = load_connection(lab, gate)
    before = negotiation(gate, spec)["attempts"] if gate.ask()["negotiations"] else 0
    to = str(lab.b.address(spec))
    with contextlib.ExitStack() as stack:
        callers = [Caller(lab.a.namespace.path, gate.cgroup) for _ in range(10)]
        for caller in callers:
            stack.callback(caller.close)
            caller.forget()  # wait until it has started
        with stopped(lab):
            assert {caller("tcp", to, PORT) for caller in callers} == {"EPERM"}
        wait_until(lambda: negotiation(gate, spec)["state"] == "covered", "it is not covered")
        assert {caller("tcp", to, PORT) for caller in callers} == {"EINPROGRESS"}
    assert negotiation(gate, spec)["attempts"] == before + 1
    assert len(lab.a.established()) == 1


# --- closing -----------------------------------------------------------------------


def refused_and_nothing_in_clear(lab: Lab, gate: Gated, spec: ConnSpec) -> Captured:
    with lab.capture() as capture:
        report = connect(lab, gate, spec, "--limit", "0.5")
        seen = capture.stop()
    assert report["error"] == "limit"
    assert set(report["errnos"]) <= {"EPERM", "EHOSTUNREACH"}
    assert not seen.clear
    assert not seen.syns
    return seen


@pytest.mark.parametrize("start_action", ["trap", "none"])
def test_a_deleted_sa_closes_the_flow_and_the_next_call_negotiates_again(
    lab: Lab, gate: Gated, start_action: str
) -> None:
    spec = load_connection(lab, gate, start_action=start_action)
    assert connected(connect(lab, gate, spec))
    before = negotiation(gate, spec)["attempts"]
    lab.let_tcp_close()  # host b has no gate, and the kernel of host a answers with RST
    with lab.capture() as capture:
        lab.b.charon.terminate(spec.name)
        report = connect(lab, gate, spec)
        seen = capture.stop()
    assert connected(report)
    assert not seen.clear
    assert negotiation(gate, spec)["attempts"] == before + 1


@pytest.mark.parametrize("what", ["state", "policy"])
@pytest.mark.parametrize("how", ["flush", "deleteall"])
def test_emptying_the_kernels_databases_closes_the_flow(
    lab: Lab, gate: Gated, what: str, how: str
) -> None:
    """Without its policy the kernel would send the flow in clear."""
    spec = load_connection(lab, gate)
    assert connected(connect(lab, gate, spec))
    lab.let_tcp_close()  # host b has no gate
    lab.a.run(["ip", "xfrm", what, how])
    refused_and_nothing_in_clear(lab, gate, spec)
    # strongSwan still lists its CHILD_SA: the gate deletes it and negotiates a new one.
    with lab.capture() as capture:
        report = connect(lab, gate, spec, "--retry", "EPERM,EHOSTUNREACH")
        seen = capture.stop()
    assert connected(report)
    assert not seen.clear


def test_a_killed_daemon_closes_and_a_restarted_one_opens(lab: Lab, gate: Gated) -> None:
    spec = load_connection(lab, gate)
    assert connected(connect(lab, gate, spec))

    def is_without_ike() -> bool:
        return any("strongSwan" in error["text"] for error in gate.ask()["errors"])

    lab.a.charon.kill()
    wait_until(is_without_ike, "it did not notice")
    refused_and_nothing_in_clear(lab, gate, spec)
    lab.restart(lab.a)
    wait_until(lambda: not is_without_ike(), "it did not come back")
    refused_and_nothing_in_clear(lab, gate, spec)  # the old SAs in the kernel are not confirmed
    lab.a.run(["ip", "xfrm", "state", "flush"])
    lab.a.run(["ip", "xfrm", "policy", "flush"])
    lab.load(spec)
    lab.b.charon.drop_all()
    assert connected(connect(lab, gate, spec))


def test_a_wrong_key_is_reported_soon(lab: Lab, gate: Gated) -> None:
    spec = load_connection(lab, gate)
    lab.break_psk()
    report = connect(lab, gate, spec, "--limit", "60")
    assert report["error"] == "EHOSTUNREACH"

    def is_the_key() -> bool:
        """If the first failure was slow, only a later one has the cause."""
        connect(lab, gate, spec, "--limit", "1")
        return "AUTH" in negotiation(gate, spec)["last_error"].upper()

    wait_until(is_the_key, "the cause is never reported")


# --- the controller dies ---------------------------------------------------------------


def test_without_its_controller_the_gate_keeps_every_verdict(lab: Lab, gate: Gated) -> None:
    covered = load_connection(lab, gate, "tunnel", 4)
    uncovered = load_connection(lab, gate, "tunnel", 6)
    assert connected(connect(lab, gate, covered))
    gate.kill()

    report = connect(lab, gate, covered)
    assert connected(report)
    assert report["errnos"] == {}
    refused_and_nothing_in_clear(lab, gate, uncovered)
    status = gate.status()
    assert status["controller"]["alive"] is False
    coverage = {p["name"]: p["coverage"] for p in status["policies"]}
    assert coverage["tunnel-4/tunnel-4"] == "covered"
    assert coverage["tunnel-6/tunnel-6"] == "uncovered"
    before = {(h["hook"], h["cgroup"]) for h in status["hooks"]}

    # Restart it under constant connections: the hooks are adopted without one refusal.
    space, to = lab.a.namespace.path, str(lab.b.address(covered))
    with hammering(space, gate.cgroup, "tcp", to, PORT) as results:
        gate.start()
        called_again(results, 100)
    assert len(results) > 100
    assert set(results) == {"EINPROGRESS"}
    assert {(h["hook"], h["cgroup"]) for h in gate.status()["hooks"]} == before
    assert connected(connect(lab, gate, uncovered))


def test_a_second_controller_is_refused(gate: Gated) -> None:
    second = gate.cli("run", check=False)
    assert second.returncode == 1
    assert "is running" in second.stderr


def test_an_established_connection_is_blocked_and_continues_under_the_next_sa(
    lab: Lab, gate: Gated
) -> None:
    """No trap remains, so without the gate the kernel would send everything in clear.

    A blocked packet also starts a negotiation, and TCP's retransmission then finds the SA.
    """
    spec = load_connection(lab, gate, start_action="none")
    assert connected(connect(lab, gate, spec, "--retry", "EPERM"))
    caller = Caller(lab.a.namespace.path, gate.cgroup)
    calls, to = ("kept stream", "kept connected 4"), str(lab.b.address(spec))
    try:
        assert [caller(call, to, PORT) for call in calls] == ["", ""]
        counted = Counted(gate)
        with lab.capture() as capture:
            lab.a.charon.terminate(spec.child_name)
            deadline = time.monotonic() + 60
            while negotiation(gate, spec)["state"] != "covered" or not counted["block_clear"]:
                assert time.monotonic() < deadline, "the blocked packet starts no negotiation"
                results = {caller(call, to, PORT) for call in calls}
                assert results <= {"", "EPERM", "ECONNREFUSED"}
                time.sleep(0.02)
            after = time.monotonic()
            assert caller("kept stream", to, PORT) == "", "the connection is still established"
            time.sleep(0.5)
            seen = capture.stop()
    finally:
        caller.close()
    assert [packet for packet in seen.clear if packet.sender == "a"] == []
    assert [packet for packet in seen.esp if packet.sender == "a" and packet.time > after]


def test_events_show_each_refusal_with_its_policy_and_the_negotiation(
    lab: Lab, gate: Gated
) -> None:
    spec = load_connection(lab, gate, start_action="none")
    to = str(lab.b.address(spec))
    follower = lab.a.popen(gate.argv("--json", "events", "--follow"), stdout=subprocess.PIPE)
    try:
        assert connected(connect(lab, gate, spec, "--retry", "EPERM"))
        lab.a.charon.terminate(spec.child_name)
        caller = Caller(lab.a.namespace.path, gate.cgroup)
        caller.forget()  # wait until it has started
        with stopped(lab):  # both calls come before the SA that the first one starts
            assert caller("tcp", to, PORT) == "EPERM"
            assert caller("raw", to) == "EPERM"  # a raw socket is blocked, not refused
        caller.close()
        records = json.loads(gate.cli("--json", "events").stdout)
        denied = json.loads(gate.cli("--json", "events", "--denied", "--last", "2").stdout)
        assert follower.stdout is not None
        news, followed = list[dict[str, Any]](), list[dict[str, Any]]()
        while len(followed) < len(records):
            record = json.loads(follower.stdout.readline())
            (news if record["kind"] in NEWS else followed).append(record)
    finally:
        follower.kill()
        follower.wait()
    assert [event["seq"] for event in followed] == [event["seq"] for event in records]
    assert {event["of"] for event in news if event["kind"] == "covered"} <= {
        event["seq"] for event in records if event.get("covered_after") is not None
    }
    ours = [event for event in records if to in event.get("flow", "")]
    # The FIN of the connection was also blocked.
    blocked = [event for event in ours if event["kind"] == "blocked"]
    assert f"253 {to}" in {event["flow"] for event in blocked}
    assert {event["reason"] for event in blocked} == {"block_clear"}
    refused = next(event for event in ours if event["kind"] == "refused")
    assert refused["flow"] == f"tcp {to}:{PORT}"
    assert refused["reason"] in ("refuse_uncovered", "refuse_no_source")
    assert refused["policy"] == f"{spec.name}/{spec.child_name}"
    assert refused["comm"].startswith("python")
    logged = [event["text"] for event in records if event["kind"] == "log"]
    assert any(
        text.startswith(f"child {spec.name}/{spec.child_name}: negotiating") for text in logged
    )
    assert len(denied) == 2
    assert {event["kind"] for event in denied} <= {"refused", "blocked"}
    screen = gate.cli("events").stdout
    assert f"tcp {to}:{PORT}" in screen
    assert "a packet would have left in clear" in screen
