"""How far what somebody waits for is: which flows stand for a policy, and when they are covered."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.readiness import (
    Goal,
    Kind,
    Progress,
    State,
    cause,
    child_sas,
    every_policy,
    look,
    network_of,
    wanted,
)
from ipsecgate.core.gate.samples import Samples
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import TCP, UDP, Flow, FlowPath, TrafficSelector
from ipsecgate.core.model.ipsec import Action, ChildConfig, ChildName, Mode
from ipsecgate.core.model.policy import Policy, Settings
from ipsecgate.core.model.problem import Cause, Problem
from tests.unit.transcript import (
    FLOW,
    HERE,
    LISTED,
    NAME,
    NET,
    PINNED,
    SA,
    SOURCES,
    THERE,
    TRAP,
    UP,
    Transcript,
    connected,
    initiated,
)

TO = Goal(Kind.FLOW, "10.2.0.9:80", FLOW)
PROTECT = Policy("db", (THERE,), proto=TCP, ports=(5432, 5433))


def at(transcript: Transcript, goal: Goal, *, every: bool = False) -> Progress:
    return look(transcript.gate, Samples(transcript.gate), goal, every=every)


def configured(*policies: Policy, children: tuple[ChildConfig, ...] = (NET,)) -> Transcript:
    transcript = Transcript(Settings(policies=policies))
    paths = (THERE, FlowPath(ip_address("10.1.0.1")))
    transcript.after(
        on.KernelSnapshot((TRAP,), ()),
        on.IkeConnected(children, (), 42),
        on.PathsResolved((paths,)),
    )
    return transcript


def child(remote: str, name: str = "net", proto: int = 0, port: int = 0) -> ChildConfig:
    ports = (port, port) if port else (0, 0xFFFF)
    selector = TrafficSelector(ip_network(remote), proto, ports)
    return ChildConfig(ChildName(name, name), Mode.TUNNEL, (TrafficSelector(HERE),), (selector,))


# --- the flows that stand for a policy ----------------------------------------------------------


@pytest.mark.parametrize(
    ("networks", "children", "hosts"),
    [
        (["10.2.0.0/16"], ["10.2.0.0/16"], ["10.2.0.1"]),
        (["10.2.0.0/16"], ["10.0.0.0/8"], ["10.2.0.1"]),
        (["10.2.0.0/16"], ["10.2.3.0/24", "10.2.9.0/24"], ["10.2.3.1", "10.2.9.1"]),
        (["10.2.0.0/16"], ["10.0.0.0/8", "10.2.9.0/24"], ["10.2.9.1", "10.2.0.1"]),
        (["10.2.0.0/16"], ["192.0.2.0/24"], ["10.2.0.1"]),
        (["10.2.0.0/16"], [], ["10.2.0.1"]),
        (["10.2.0.5/32"], ["10.2.0.0/16"], ["10.2.0.5"]),
        (["10.2.0.0/31"], ["10.2.0.0/16"], ["10.2.0.0"]),
        (["10.2.0.0/24", "10.3.0.0/24"], ["10.2.0.0/16"], ["10.2.0.1", "10.3.0.1"]),
        (["10.2.0.0/24", "2001:db8::/64"], ["10.2.0.0/16"], ["10.2.0.1", "2001:db8::1"]),
    ],
)
def test_one_flow_for_each_part_of_a_policy(
    networks: list[str], children: list[str], hosts: list[str]
) -> None:
    policy = replace(PROTECT, remote=tuple(map(ip_network, networks)))
    loaded = tuple(child(remote, f"net{at}") for at, remote in enumerate(children))
    transcript = configured(policy, children=loaded)
    flows = Samples(transcript.gate).of(policy)
    assert flows == tuple(Flow(ip_address(host), TCP, 5432) for host in hosts)


def test_a_childs_ports_and_protocol_narrow_the_flow() -> None:
    policy = Policy("any", (THERE,))
    loaded = (child("10.2.0.0/24", "dns", UDP, 53), child("10.2.1.0/24", "web", TCP, 80))
    flows = Samples(configured(policy, children=loaded).gate).of(policy)
    assert [(flow.proto, flow.dport) for flow in flows] == [(UDP, 53), (TCP, 80)]


def test_a_policy_that_names_a_child_ignores_the_others() -> None:
    policy = replace(PROTECT, child="b")
    loaded = (child("10.2.3.0/24", "a"), child("10.2.9.0/24", "b"))
    flows = Samples(configured(policy, children=loaded).gate).of(policy)
    assert [str(flow.daddr) for flow in flows][:1] == ["10.2.9.1"]
    assert "10.2.3.1" not in {str(flow.daddr) for flow in flows}


def test_exceptions_and_the_hosts_own_address_do_not_stand_for_a_policy() -> None:
    gateway = Policy("gateway", (ip_network("10.2.0.0/25"),), Action.BYPASS)
    transcript = configured(gateway, PROTECT)
    (flow,) = Samples(transcript.gate).of(PROTECT)
    assert flow.daddr in THERE
    assert flow.daddr not in gateway.remote[0]
    own = ip_address("10.2.0.1")
    transcript = configured(PROTECT)
    transcript.after(on.PathsResolved(((THERE, FlowPath(own)),)))
    (flow,) = Samples(transcript.gate).of(PROTECT)
    assert str(flow.daddr) == "10.2.0.2"


def test_a_policy_that_exceptions_take_whole_needs_nothing() -> None:
    transcript = configured(Policy("all", (THERE,), Action.BYPASS), PROTECT)
    assert at(transcript, Goal(Kind.POLICY, "db")).state is State.COVERED


# --- states -------------------------------------------------------------------------------------


def test_the_life_of_a_flow(trapped: Transcript) -> None:
    found = at(trapped, TO)
    assert (found.state, found.missing) == (State.WAITING, (FLOW,))
    assert cause(trapped.gate, found).text == f"child {NAME} was not asked for yet"
    assert wanted(trapped.gate, FLOW, "") == (NAME, 0)

    assert initiated(trapped.after(on.Wanted(FLOW))) == [NAME]
    assert wanted(trapped.gate, FLOW, "") is None, "it is under way"
    assert initiated(trapped.after(on.Wanted(FLOW))) == []

    trapped.after(on.NegotiationFailed(NAME, Cause("no proposal chosen")))
    why = cause(trapped.gate, at(trapped, TO))
    assert why.text.endswith("last error: no proposal chosen")
    assert NAME.child in why.advice
    assert wanted(trapped.gate, FLOW, "") is None, "it will be tried again"
    trapped.after(on.TimerFired(on.Timer("retry", NAME)))
    assert wanted(trapped.gate, FLOW, "") == (NAME, 1)

    trapped.after(*UP)
    found = at(trapped, TO)
    assert (found.state, found.missing) == (State.COVERED, ())
    assert cause(trapped.gate, found) == Problem("")
    trapped.after(on.SaGone(SA.id))
    assert at(trapped, TO).state is State.WAITING


def test_a_derived_policy_by_its_name_and_all_of_them(trapped: Transcript) -> None:
    goal = Goal(Kind.POLICY, str(NAME))
    assert every_policy(trapped.gate) == (goal,)
    assert at(trapped, goal).state is State.WAITING
    trapped.after(on.Wanted(FLOW), *UP)
    assert at(trapped, goal).state is State.COVERED


def test_before_anything_is_known() -> None:
    transcript = Transcript()
    assert every_policy(transcript.gate) == ()
    for goal in (TO, Goal(Kind.POLICY, "db"), Goal(Kind.NAME, "db")):
        found = at(transcript, goal)
        assert found.state is State.WAITING
        assert cause(transcript.gate, found).text
        assert wanted(transcript.gate, FLOW, "") is None, "no daemon"


def test_without_a_daemon_the_cause_says_so(trapped: Transcript) -> None:
    trapped.after(on.IkeGone(Problem("Connection refused")))
    found = at(trapped, TO)
    assert found.state is State.WAITING
    assert "Connection refused" in cause(trapped.gate, found).text
    assert wanted(trapped.gate, FLOW, "") is None


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (Policy("out", (THERE,), Action.BYPASS), "policy out lets it leave unprotected"),
        (Policy("out", (THERE,), Action.DISCARD), "policy out discards it"),
        (Policy("out", (ip_network("192.0.2.0/24"),), Action.BYPASS), "no policy protects"),
    ],
)
def test_what_the_operator_lets_go_is_never_covered(policy: Policy, said: str) -> None:
    transcript = configured(policy, replace(PROTECT, remote=(ip_network("10.9.0.0/16"),)))
    found = at(transcript, TO)
    assert found.state is State.NEVER
    assert said in cause(transcript.gate, found).text


def test_an_unknown_name_lists_those_that_are_known() -> None:
    transcript = configured(PROTECT, Policy("out", (THERE,), Action.BYPASS))
    for kind, known in ((Kind.POLICY, "db"), (Kind.NAME, f"db, {NET.name}")):
        found = at(transcript, Goal(kind, "nosuch"))
        assert found.state is State.NEVER
        assert cause(transcript.gate, found).text.endswith(f"is named nosuch; known: {known}")


def test_a_policy_of_several_networks_names_the_one_that_is_missing() -> None:
    far = ip_network("10.9.0.0/24")
    transcript = configured(replace(PROTECT, remote=(THERE, far)))
    found = at(transcript, Goal(Kind.POLICY, "db"))
    assert [network_of(transcript.gate, flow) for flow in found.missing] == [str(THERE), str(far)]
    transcript = configured(PROTECT)
    (flow,) = at(transcript, Goal(Kind.POLICY, "db")).missing
    assert network_of(transcript.gate, flow) is None


def test_a_flow_that_no_connection_names_yet_may_come(trapped: Transcript) -> None:
    elsewhere = Goal(Kind.FLOW, "", Flow(ip_address("10.9.0.1"), TCP, 80))
    found = at(trapped, elsewhere)
    assert found.state is State.WAITING
    assert "no policy protects" in cause(trapped.gate, found).text


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "10.1.0.1"])
def test_what_never_leaves_the_host_needs_no_sa(host: str) -> None:
    everything = Policy("all", (HERE, THERE, ip_network("127.0.0.0/8"), ip_network("::/0")))
    transcript = configured(everything)
    transcript.after(on.PathsResolved(((HERE, FlowPath(ip_address("10.1.0.1"))),)))
    assert (
        at(transcript, Goal(Kind.FLOW, "", Flow(ip_address(host), TCP, 80))).state is State.COVERED
    )


def test_a_name_that_nothing_has() -> None:
    transcript = configured(PROTECT)
    for kind in (Kind.POLICY, Kind.NAME):
        found = at(transcript, Goal(kind, "typo"))
        assert found.state is State.NEVER
        assert "is named typo" in cause(transcript.gate, found).text
    derived = Transcript()
    derived.after(connected(), SOURCES)
    assert at(derived, Goal(Kind.POLICY, "typo")).state is State.WAITING, "it may be loaded yet"
    bypass = Policy("out", (ip_network("192.0.2.0/24"),), Action.BYPASS)
    found = at(configured(bypass, PROTECT), Goal(Kind.POLICY, "out"))
    assert found.state is State.NEVER


def test_a_wildcard_has_no_peer_to_wait_for() -> None:
    mesh = replace(child("10.2.0.0/16", "mesh"), wildcard=True)
    transcript = configured(replace(PROTECT, child="mesh"), children=(mesh,))
    goal = Goal(Kind.POLICY, "db")
    assert at(transcript, goal).state is State.NEVER
    assert at(transcript, goal, every=True).state is State.COVERED
    assert at(transcript, Goal(Kind.NAME, "mesh")).state is State.NEVER


# --- children -----------------------------------------------------------------------------------


def test_a_child_by_name() -> None:
    transcript = Transcript()
    transcript.after(on.KernelSnapshot((TRAP,), ()), connected(), SOURCES)
    for name in ("net", "peer/net"):
        found = at(transcript, Goal(Kind.NAME, name))
        assert (found.state, found.child) == (State.WAITING, name)
    transcript.after(*UP, on.ChildUp(LISTED))
    assert at(transcript, Goal(Kind.NAME, "net")).state is State.COVERED
    assert child_sas(transcript.gate, "net") == [LISTED]
    assert child_sas(transcript.gate, "typo") == []


def test_of_two_gateways_the_named_one_is_asked_for() -> None:
    """Although the other one already covers the flows."""
    second = replace(NET, name=ChildName("second", "net"))
    transcript = Transcript()
    transcript.after(
        on.KernelSnapshot((PINNED,), (SA,)), on.IkeConnected((NET, second), (LISTED,), 42), SOURCES
    )
    assert at(transcript, Goal(Kind.NAME, "peer/net")).state is State.COVERED
    found = at(transcript, Goal(Kind.NAME, "second/net"))
    assert found.state is State.WAITING
    (flow,) = found.missing
    name = ChildName("second", "net")
    assert initiated(transcript.after(on.Wanted(flow, found.child))) == [name]
    assert initiated(transcript.after(on.Wanted(flow, found.child))) == [], "it is under way"
    transcript.after(on.SaGone(SA.id), on.SaSet(SA))  # the flow is covered, by the other
    assert initiated(transcript.after(on.Wanted(flow, found.child))) == [name]


def test_a_child_that_no_policy_needs() -> None:
    transcript = configured(PROTECT, children=(NET, child("192.0.2.0/24", "other")))
    found = at(transcript, Goal(Kind.NAME, "other"))
    assert found.state is State.NEVER
    assert "no policy has anything protected by other" in found.why


def test_the_sas_of_a_policy_are_those_towards_its_networks() -> None:
    transcript = configured(PROTECT)
    away = replace(
        LISTED, spi_out=7, spi_in=8, remote=(TrafficSelector(ip_network("10.9.0.0/16")),)
    )
    transcript.after(on.ChildUp(LISTED), on.ChildUp(away))
    assert child_sas(transcript.gate, "db") == [LISTED]
    assert child_sas(transcript.gate, "net") == [LISTED, away]


def test_wanting_changes_nothing_for_a_covered_flow(trapped: Transcript) -> None:
    trapped.after(on.Wanted(FLOW), *UP)
    assert not any(isinstance(c, do.Initiate) for c in trapped.after(on.Wanted(FLOW)))
