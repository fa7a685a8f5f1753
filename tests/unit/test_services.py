"""Service addresses that NAT leads to protected backends: both tables, negotiations, held calls."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from ipsecgate.core.gate import commands as do
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import TCP, Flow, FlowPath, Selector
from ipsecgate.core.model.ipsec import Action, SpdEntry, SpdKey
from ipsecgate.core.model.nat import Service
from ipsecgate.core.model.policy import Policy, Settings
from ipsecgate.core.tables.layout import State, TableId
from tests.unit.transcript import (
    FLOW,
    NAME,
    ROUTED,
    SA,
    SOURCES,
    THERE,
    TRAP,
    UP,
    Transcript,
    connected,
    initiated,
)

ADDRESS = ip_address("198.18.0.9")
VIA = Flow(ADDRESS, TCP, 80)
VIA_ROUTED = replace(VIA, saddr=ROUTED.saddr)
SERVICE = Service(ADDRESS, TCP, (80, 80), ((FLOW.daddr, 8080),), "rule 1")
RESOLVED = on.ServicesResolved((SERVICE,))
PATHS = on.PathsResolved((*SOURCES.paths, (ip_network(ADDRESS), FlowPath(ROUTED.saddr))))
CALL = on.CallMade(on.Call(1, 1), VIA, pid=9, limit=30.0)


def with_service(*services: Service, settings: Settings | None = None) -> Transcript:
    transcript = Transcript(settings)
    transcript.after(on.KernelSnapshot((TRAP,), ()), connected(), SOURCES)
    transcript.after(on.ServicesResolved(services or (SERVICE,)), PATHS)
    return transcript


def named(transcript: Transcript, flow: Flow = VIA_ROUTED) -> State | None:
    entry = transcript.entry(TableId.POLICY, flow)
    return None if entry is None else entry.state


def test_a_service_is_open_while_its_backend_is_covered() -> None:
    transcript = with_service()
    assert named(transcript) is State.DERIVED
    assert not transcript.is_open(VIA_ROUTED)
    transcript.after(*UP)
    assert transcript.is_open(VIA_ROUTED)
    assert not transcript.is_open(replace(VIA_ROUTED, saddr=ip_address("10.9.0.1")))
    assert not transcript.is_open(replace(VIA_ROUTED, mark=1)), "rules may depend on the mark"
    assert named(transcript, replace(VIA_ROUTED, dport=81)) is None
    closed = transcript.after(on.SaGone(SA.id))
    assert len([one for one in closed if isinstance(one, do.Change)]) >= 1
    assert not transcript.is_open(VIA_ROUTED)


def test_one_change_closes_the_service_and_its_backend() -> None:
    transcript = with_service()
    transcript.after(*UP)
    first = transcript.after(on.SaGone(SA.id))[0]
    assert isinstance(first, do.Change)
    assert {entry.state for entry in first.entries.values() if entry} <= {State.DEAD}


def test_routing_is_asked_for_the_source_of_a_service() -> None:
    transcript = Transcript()
    transcript.after(on.KernelSnapshot((TRAP,), ()), connected(), SOURCES)
    (asked,) = (c for c in transcript.after(RESOLVED) if isinstance(c, do.ResolvePaths))
    assert asked.destinations == (THERE, ip_network(ADDRESS))


def test_without_a_source_a_service_stays_closed() -> None:
    transcript = Transcript()
    transcript.after(on.KernelSnapshot((TRAP,), ()), connected(), SOURCES, RESOLVED, *UP)
    assert not transcript.is_open(VIA_ROUTED)
    transcript.after(PATHS)
    assert transcript.is_open(VIA_ROUTED)


def test_a_refusal_asks_for_the_child_of_the_backend() -> None:
    transcript = with_service()
    refusal = on.FlowRefused(VIA, 6, policy=0, pid=9, comm="curl", cgroup=1)
    assert initiated(transcript.after(refusal)) == [NAME]
    flow = transcript.gate.negotiations.by_child[NAME].flow
    assert (flow.daddr, flow.dport) == (FLOW.daddr, 8080)


def test_a_call_to_a_service_is_held_until_its_backend_is_covered() -> None:
    transcript = with_service()
    commands = transcript.after(CALL)
    assert initiated(commands) == [NAME]
    assert any(isinstance(one, do.Hold) for one in commands)
    commands = transcript.after(*UP)
    changed = next(at for at, one in enumerate(commands) if isinstance(one, do.Change))
    answered = next(at for at, one in enumerate(commands) if isinstance(one, do.Answer))
    assert changed < answered
    answer = commands[answered]
    assert isinstance(answer, do.Answer)
    assert answer.error is None


def test_each_protected_backend_counts_and_no_other() -> None:
    elsewhere = ip_address("203.0.113.5")  # no policy names it
    transcript = with_service(replace(SERVICE, backends=((FLOW.daddr, 0), (elsewhere, 80))))
    transcript.after(*UP)
    assert transcript.is_open(VIA_ROUTED)
    transcript.after(on.ServicesResolved((replace(SERVICE, backends=((elsewhere, 80),)),)))
    assert named(transcript) is None


@pytest.mark.parametrize("action", [Action.PROTECT, Action.DISCARD])
def test_one_backend_that_is_not_covered_closes_the_service(action: Action) -> None:
    other = ip_network("203.0.113.0/24")
    policies = (Policy("net", (THERE,)), Policy("other", (other,), action))
    backends = ((FLOW.daddr, 0), (other[5], 80))
    transcript = with_service(
        replace(SERVICE, backends=backends), settings=Settings(policies=policies)
    )
    transcript.after(*UP)
    assert transcript.is_open()
    assert not transcript.is_open(VIA_ROUTED)


def test_a_dead_kernel_policy_of_the_service_address_closes_it() -> None:
    """The kernel looks the service up before it translates the packet."""
    transcript = with_service()
    transcript.after(*UP)
    key = SpdKey(Selector(THERE.supernet(new_prefix=1), ip_network("198.18.0.0/15")))
    blocking = SpdEntry(SpdKey(replace(key.selector, src=ip_network("0.0.0.0/0"))), 100,
                        Action.DISCARD)  # fmt: skip
    transcript.after(on.PolicySet(blocking))
    assert not transcript.is_open(VIA_ROUTED)
    transcript.after(on.PolicyGone(blocking.key))
    assert transcript.is_open(VIA_ROUTED)


def test_a_rule_that_is_gone_leaves_nothing_in_the_tables() -> None:
    transcript = with_service()
    before = Transcript()
    before.after(on.KernelSnapshot((TRAP,), ()), connected(), SOURCES, PATHS)
    transcript.after(on.ServicesResolved(()))
    assert transcript.tables == before.tables
