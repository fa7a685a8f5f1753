"""Held calls: the hook table is written before the answer, and no errno misleads the caller."""

from __future__ import annotations

from dataclasses import replace
from errno import EAGAIN, EHOSTUNREACH, EINPROGRESS, EINTR, ETIMEDOUT
from ipaddress import ip_address

import pytest

from ipsecgate.core.codec.seccomp import ERESTARTNOINTR
from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.holds import CALLS_PER_STEP
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import UDP, Flow, FlowPath, is_exempt
from ipsecgate.core.model.ipsec import Action
from ipsecgate.core.model.policy import Policy, Settings
from ipsecgate.core.model.problem import Cause, Problem
from tests.unit.transcript import (
    FLOW,
    NAME,
    NET,
    SOURCES,
    THERE,
    TRAP,
    UP,
    Transcript,
    connected,
    initiated,
)

CALL = on.Call(1, 77)
MADE = on.CallMade(CALL, FLOW, pid=9, limit=30.0)
ELSEWHERE = Flow(ip_address("198.51.100.1"), 6, 80)


def made(number: int, flow: Flow = FLOW) -> on.CallMade:
    return on.CallMade(on.Call(1, number), flow, pid=number, limit=30.0)


def answers(commands: list[do.Command]) -> dict[on.Call, int | None]:
    answered = {c.call: c.error for c in commands if isinstance(c, do.Answer)}
    assert not {EAGAIN, EINTR, EINPROGRESS} & set(answered.values())
    return answered


def test_a_call_is_held_until_covered_and_answered_after_the_table_is_written(
    trapped: Transcript,
) -> None:
    asked = trapped.after(MADE)
    assert initiated(asked) == [NAME]
    assert do.Hold(MADE) in asked
    assert not answers(asked)
    opened = trapped.after_together(*UP)
    assert answers(opened) == {CALL: None}
    wrote = next(n for n, c in enumerate(opened) if isinstance(c, do.Change | do.Publish))
    assert opened.index(do.Answer(CALL, None)) > wrote
    assert trapped.is_open()
    assert not trapped.gate.holds.calls
    assert trapped.gate.holds.total == 1


def test_many_held_calls_start_one_negotiation(trapped: Transcript) -> None:
    asked = trapped.after(*(made(n) for n in range(500)))
    assert initiated(asked) == [NAME]
    answered = answers(trapped.after_together(*UP))
    while trapped.gate.has_more:
        answered |= answers(trapped.after_together())
    assert list(answered) == [on.Call(1, n) for n in range(500)], "the oldest first"
    assert set(answered.values()) == {None}
    assert not trapped.gate.holds.calls


def test_many_calls_are_answered_in_slices_as_long_as_their_flow_is_covered(
    trapped: Transcript,
) -> None:
    """What closes the flow does not wait for all of them, and those that are left wait on."""
    trapped.after(*(made(n) for n in range(500)))
    assert len(answers(trapped.after_together(*UP))) == CALLS_PER_STEP
    assert not answers(trapped.after_together(on.SaGone(UP[0].sa.id)))
    assert not trapped.gate.has_more
    assert len(trapped.gate.holds.calls) == 500 - CALLS_PER_STEP
    assert answers(trapped.after(on.CallExpired(on.Call(1, 499)))) == {on.Call(1, 499): ETIMEDOUT}
    assert len(answers(trapped.after_together(*UP))) == 500 - CALLS_PER_STEP - 1
    assert not trapped.gate.holds.calls


def test_calls_for_many_flows_are_answered_in_slices(trapped: Transcript) -> None:
    flows = [replace(FLOW, dport=1000 + n) for n in range(8)]
    trapped.after(*(made(100 * at + n, flow) for at, flow in enumerate(flows) for n in range(100)))
    trapped.after_together(*UP)
    assert len(trapped.gate.holds.calls) == 500, "three flows have more than a slice"
    while trapped.gate.has_more:
        trapped.after_together()
    assert not trapped.gate.holds.calls


def test_a_call_for_a_covered_flow_continues_at_once(trapped: Transcript) -> None:
    trapped.after_together(*UP)
    assert trapped.after(MADE) == [do.Answer(CALL, None)]
    trapped.after(on.SaGone(UP[0].sa.id))
    assert not answers(trapped.after(MADE))


@pytest.mark.parametrize(
    "flow",
    [
        ELSEWHERE,
        Flow(ip_address("127.0.0.1"), 6, 80),
        Flow(ip_address("::1"), 6, 80),
        Flow(ip_address("0.0.0.0"), 6, 80),
    ],
)
def test_a_call_that_needs_no_sa_continues_at_once(trapped: Transcript, flow: Flow) -> None:
    assert trapped.after(replace(MADE, flow=flow)) == [do.Answer(CALL, None)]


@pytest.mark.parametrize("action", [Action.BYPASS, Action.DISCARD])
def test_a_call_that_the_hook_decides_alone_continues_at_once(action: Action) -> None:
    transcript = Transcript(Settings(policies=(Policy("p", (THERE,), action),)))
    transcript.after(on.KernelSnapshot((TRAP,), ()), connected(), SOURCES)
    assert transcript.after(MADE) == [do.Answer(CALL, None)]


def test_audit_mode_holds_nothing() -> None:
    transcript = Transcript(Settings(audit=True))
    transcript.after(on.KernelSnapshot((TRAP,), ()), connected(), SOURCES)
    assert transcript.after(MADE) == [do.Answer(CALL, None)]


def test_a_call_to_an_own_address_continues_at_once(trapped: Transcript) -> None:
    own = ip_address("10.2.0.1")
    trapped.after(on.PathsResolved(((THERE, FlowPath(own)),)))
    assert trapped.after(replace(MADE, flow=replace(FLOW, daddr=own))) == [do.Answer(CALL, None)]


def test_a_failed_negotiation_fails_every_held_call(trapped: Transcript) -> None:
    trapped.after(made(1), made(2))
    commands = trapped.after(on.NegotiationFailed(NAME, Cause("AUTHENTICATION_FAILED")))
    assert answers(commands) == {on.Call(1, 1): EHOSTUNREACH, on.Call(1, 2): EHOSTUNREACH}
    assert any(isinstance(c, do.Log) and "AUTHENTICATION_FAILED" in c.text for c in commands)
    assert answers(trapped.after(made(3))) == {on.Call(1, 3): EHOSTUNREACH}, "during back-off"


def test_a_held_call_times_out_at_its_limit(trapped: Transcript) -> None:
    trapped.after(MADE)
    assert answers(trapped.after(on.CallExpired(CALL))) == {CALL: ETIMEDOUT}
    assert trapped.after(on.CallExpired(CALL)) == []
    assert not answers(trapped.after_together(*UP))


def test_an_interrupted_call_is_restarted(trapped: Transcript) -> None:
    trapped.after(MADE)
    assert answers(trapped.after(on.CallInterrupted(CALL))) == {CALL: ERESTARTNOINTR}
    assert trapped.after(on.CallInterrupted(CALL)) == [], "or the caller sees errno 513"


def test_the_call_of_a_dead_process_is_forgotten(trapped: Transcript) -> None:
    trapped.after(MADE)
    assert trapped.after(on.CallGone(CALL)) == []
    assert not trapped.gate.holds.calls


def test_a_call_is_held_before_kernel_and_daemon_have_answered() -> None:
    transcript = Transcript()
    assert transcript.after(MADE) == [do.Hold(MADE)]
    derived = transcript.after(on.KernelSnapshot((TRAP,), ()), connected(), SOURCES)
    assert initiated(derived) == [NAME]
    assert answers(transcript.after_together(*UP)) == {CALL: None}


def test_a_call_held_without_a_daemon_is_negotiated_when_it_returns(trapped: Transcript) -> None:
    trapped.after(on.IkeGone(Problem("crashed")))
    assert not initiated(trapped.after(MADE))
    assert initiated(trapped.after(connected())) == [NAME]


def test_a_call_without_a_connection_is_held_until_one_is_loaded() -> None:
    transcript = Transcript(Settings(policies=(Policy("p", (THERE,)),)))
    transcript.after(on.KernelSnapshot((), ()), on.IkeConnected((), (), 42), SOURCES)
    asked = transcript.after(MADE)
    assert do.AskIke() in asked
    idle = transcript.after(on.IkeConnected((), (), 42))
    assert do.AskIke() not in idle, "otherwise the daemon is polled without a pause"
    assert initiated(transcript.after(on.IkeConnected((NET,), (), 42))) == [NAME]


def test_a_call_in_the_same_batch_as_a_closing_is_not_let_through(trapped: Transcript) -> None:
    trapped.after_together(*UP)
    commands = trapped.after_together(MADE, on.SaGone(UP[0].sa.id))
    assert not answers(commands)


@pytest.mark.parametrize(
    ("address", "proto", "port", "source", "exempt"),
    [
        ("127.255.255.255", 6, 1, 0, True),
        ("128.0.0.0", 6, 1, 0, False),
        ("126.255.255.255", 6, 1, 0, False),
        ("::", 6, 1, 0, True),
        ("::2", 6, 1, 0, False),
        ("255.255.255.255", UDP, 67, 68, True),
        ("255.255.255.255", UDP, 67, 0, False),
        ("255.255.255.255", UDP, 68, 68, False),
        ("255.255.255.255", 6, 67, 68, False),
        ("ff02::1:2", UDP, 547, 546, True),
        ("ff02::1:2", UDP, 547, 547, False),
        ("ff02::1:3", UDP, 547, 546, False),
    ],
)
def test_the_same_destinations_are_exempt_as_in_the_hooks(
    address: str, proto: int, port: int, source: int, exempt: bool
) -> None:
    assert is_exempt(Flow(ip_address(address), proto, port, sport=source)) is exempt
