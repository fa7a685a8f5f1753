"""Which refused flows start a negotiation, and how a negotiation ends."""

from __future__ import annotations

from dataclasses import replace
from errno import EHOSTUNREACH, EPERM
from ipaddress import ip_address, ip_network

import pytest

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.coverage import Coverage
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import Selector, TrafficSelector
from ipsecgate.core.model.ipsec import SpdKey
from ipsecgate.core.model.policy import Policy, Settings
from ipsecgate.core.model.problem import Cause, Problem
from tests.unit.transcript import (
    FLOW,
    HERE,
    LISTED,
    NAME,
    NET,
    PINNED,
    REFUSED,
    SA,
    SOURCES,
    THERE,
    TRAP,
    UP,
    Transcript,
    connected,
    initiated,
)


def test_a_hundred_refused_flows_start_one_negotiation(trapped: Transcript) -> None:
    flows = [replace(FLOW, daddr=ip_address(f"10.2.{i}.1"), dport=i + 1) for i in range(100)]
    commands = trapped.after(*(replace(REFUSED, flow=flow) for flow in flows))
    assert initiated(commands) == [NAME]


def test_after_a_failure_the_gate_backs_off_with_another_errno(trapped: Transcript) -> None:
    assert trapped.errno == EPERM
    trapped.after(REFUSED)
    commands = trapped.after(on.NegotiationFailed(NAME, Cause("AUTHENTICATION_FAILED")))
    pauses = [c.seconds for c in commands if isinstance(c, do.StartTimer)]
    assert len(pauses) == 1
    assert 0.75 <= pauses[0] <= 1.25
    assert trapped.errno == EHOSTUNREACH
    assert trapped.gate.negotiations.by_child[NAME].last_error == Cause("AUTHENTICATION_FAILED")
    assert initiated(trapped.after(REFUSED)) == []

    trapped.after(on.TimerFired(on.Timer("retry", NAME)))
    assert trapped.errno == EPERM
    assert initiated(trapped.after(REFUSED)) == [NAME]


def test_a_negotiation_without_an_answer_ends_at_its_limit(trapped: Transcript) -> None:
    trapped.after(REFUSED, on.TimerFired(on.Timer("limit", NAME)))
    item = trapped.gate.negotiations.by_child[NAME]
    assert item.coverage is Coverage.BACK_OFF
    assert "strongSwan did not finish within" in str(item.last_error)


def test_how_negotiations_ended_is_counted_by_policy(trapped: Transcript) -> None:
    policy = trapped.gate.policies[0]
    trapped.after(REFUSED, on.NegotiationFailed(NAME, Cause("NO_PROPOSAL_CHOSEN")))
    late = on.NegotiationFailed(NAME, Cause("a late report"))
    trapped.after(REFUSED, late)  # it has ended already
    trapped.after(on.TimerFired(on.Timer("retry", NAME)), REFUSED, on.IkeGone(Problem("it died")))
    trapped.after(connected(), REFUSED, *UP)
    ended = {
        (policy.name, "failed"): 1,
        (policy.name, "aborted"): 1,
        (policy.name, "established"): 1,
    }
    assert trapped.gate.negotiations.ended == ended
    other = replace(policy, name="other", remote=(ip_network("10.2.0.0/17"),))
    trapped.after(on.Reconfigured(Settings(policies=(other,))), SOURCES)
    assert not trapped.gate.negotiations.ended, "a policy that is gone is not counted any more"


@pytest.mark.parametrize("within", [True, False])
def test_a_child_that_only_the_daemon_has_is_deleted_at_the_limit(
    trapped: Transcript, within: bool
) -> None:
    """After a flush of the kernel's databases the daemon keeps reporting its child as up."""
    remote = THERE if within else ip_network("10.2.7.0/24")
    listed = replace(LISTED, remote=(TrafficSelector(remote),))
    commands = trapped.after(REFUSED, on.NegotiationDone(NAME))
    assert do.AskIke() in commands
    commands = trapped.after(connected(listed), on.TimerFired(on.Timer("limit", NAME)))
    assert (do.Terminate(NAME) in commands) == within
    item = trapped.gate.negotiations.by_child[NAME]
    assert item.coverage is Coverage.BACK_OFF
    assert "strongSwan reports it as up" in str(item.last_error)


def test_a_negotiation_may_be_done_before_the_kernel_reports_the_sa(trapped: Transcript) -> None:
    trapped.after(REFUSED, on.NegotiationDone(NAME), *UP)
    trapped.after(on.TimerFired(on.Timer("limit", NAME)))
    assert trapped.gate.negotiations.by_child[NAME].coverage is Coverage.COVERED


def test_the_back_off_grows_up_to_its_limit(trapped: Transcript) -> None:
    pauses = []
    for _ in range(10):
        trapped.after(REFUSED)
        commands = trapped.after(on.NegotiationFailed(NAME, Cause("no")))
        pauses += [c.seconds for c in commands if isinstance(c, do.StartTimer)]
        trapped.after(on.TimerFired(on.Timer("retry", NAME)))
    assert pauses[0] < pauses[3] < pauses[5]
    assert max(pauses) <= 75


def test_a_policy_with_start_negotiates_before_any_flow_asks() -> None:
    policy = Policy("net", (THERE,), child="net", start=True)
    transcript = Transcript(Settings(policies=(policy,)))
    transcript.after(on.KernelSnapshot((TRAP,), ()))
    assert initiated(transcript.after(connected())) == [NAME]
    assert initiated(transcript.after(connected())) == []


def test_a_flow_that_no_child_protects_is_logged_once_and_not_negotiated(
    trapped: Transcript,
) -> None:
    bound_elsewhere = replace(FLOW, saddr=ip_address("172.16.0.1"))
    commands = trapped.after(replace(REFUSED, flow=bound_elsewhere))
    assert commands == [do.AskIke()]
    commands = trapped.after(connected())
    assert initiated(commands) == []
    (told,) = [c.text for c in commands if isinstance(c, do.Log)]
    assert told.startswith(
        "no loaded connection would protect tcp 10.2.0.9:80: the source 172.16.0.1 is not in"
    )
    assert trapped.after(connected()) == [], "logged once"


def test_a_connection_loaded_a_moment_ago_is_found_for_the_refused_flow(
    trapped: Transcript,
) -> None:
    trapped.after(on.IkeConnected((), (), pid=42))
    assert trapped.after(REFUSED) == [do.AskIke()]
    assert initiated(trapped.after(connected())) == [NAME]


def test_a_policy_with_start_waits_for_its_child_without_polling_the_daemon() -> None:
    transcript = Transcript(Settings(policies=(Policy("net", (THERE,), child="net", start=True),)))
    transcript.after(on.KernelSnapshot((TRAP,), ()))
    nothing = on.IkeConnected((), (), pid=42)
    for _ in range(3):
        commands = transcript.after(nothing)
        assert do.AskIke() not in commands
    assert initiated(transcript.after(connected())) == [NAME]


def test_a_kernel_policy_of_an_unknown_connection_makes_the_gate_ask_the_daemon(
    trapped: Transcript,
) -> None:
    new_policy = replace(TRAP, key=SpdKey(Selector(HERE, ip_network("10.3.0.0/16"))))
    assert do.AskIke() in trapped.after(on.PolicySet(new_policy))
    assert do.AskIke() not in trapped.after(on.PolicySet(PINNED))


def test_a_failure_has_the_time_of_its_step(trapped: Transcript) -> None:
    trapped.after(REFUSED)
    trapped.gate.step(on.NegotiationFailed(NAME, Cause("no")), now=1700.0)
    trapped.gate.step(on.TimerFired(on.Timer("retry", NAME)), REFUSED, now=1800.0)
    item = trapped.gate.negotiations.by_child[NAME]
    assert (item.coverage, item.failed_at) == (Coverage.NEGOTIATING, 1700.0)


def test_a_late_failure_says_nothing_against_a_live_sa_or_of_a_daemon_that_has_gone(
    trapped: Transcript,
) -> None:
    late = on.NegotiationFailed(NAME, Cause("late"))
    trapped.after(REFUSED, *UP, late)
    assert trapped.gate.negotiations.by_child[NAME].last_error is None
    trapped.after(on.SaGone(SA.id), REFUSED, on.IkeGone(Problem("it died")), late, connected())
    assert trapped.gate.negotiations.by_child[NAME].last_error is None


OUTDATES = {
    "an SA came in": UP,
    "the daemon has gone": (on.IkeGone(Problem("it died")),),
    "it was loaded with another identity": (
        on.IkeConnected((replace(NET, peer_id="other"),), (), pid=42),
    ),
    "it is not loaded any more": (on.IkeConnected((), (), pid=42),),
}


@pytest.mark.parametrize("what", OUTDATES)
def test_a_cause_is_forgotten_once_it_is_outdated(trapped: Transcript, what: str) -> None:
    trapped.after(REFUSED, on.NegotiationFailed(NAME, Cause("no")), connected())
    assert trapped.gate.negotiations.by_child[NAME].last_error == Cause("no"), "it still holds"
    trapped.after(*OUTDATES[what])
    assert trapped.gate.negotiations.by_child[NAME].last_error is None
