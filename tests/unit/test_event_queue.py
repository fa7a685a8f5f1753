"""Events from applications never delay events from the kernel."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from ipsecgate.core.gate.event_queue import EVENTS_PER_STEP, REFUSALS, EventQueue
from ipsecgate.core.model import events as on
from ipsecgate.core.model.ipsec import ChildName
from ipsecgate.core.model.problem import Cause
from tests.unit.transcript import FLOW, NAME, REFUSED, SA, SOURCES, connected

ASKED = on.FlowRefused | on.CallEvent


def refused(number: int) -> on.FlowRefused:
    return replace(REFUSED, flow=replace(FLOW, daddr=ip_address("10.2.0.0") + number))


def called(number: int) -> on.CallMade:
    return on.CallMade(on.Call(1, number), refused(number).flow, number, 30.0)


@pytest.mark.parametrize("ask", [refused, called])
def test_a_kernel_event_waits_for_one_slice_at_most(ask: type) -> None:
    inbox = EventQueue()
    for number in range(200):
        inbox.put(ask(number))
    began = inbox.take()
    inbox.put(on.SaGone(SA.id))
    assert len(began) <= EVENTS_PER_STEP
    assert inbox.take() == [on.SaGone(SA.id)]
    inbox.put(on.SaSet(SA))
    inbox.put(on.SaGone(SA.id))
    assert inbox.take() == [on.SaGone(SA.id)], "the last one for an object counts"


def test_every_source_gets_its_turn_and_keeps_its_order() -> None:
    inbox = EventQueue()
    queued: list[on.Event] = []
    for number in range(3 * EVENTS_PER_STEP):
        for event in (
            called(number),
            on.NegotiationFailed(NAME, Cause(f"{number}")),
            on.TimerFired(on.Timer("limit", ChildName("peer", f"{number}"))),
        ):
            inbox.put(event)
            queued.append(event)
    kinds = []
    taken: list[on.Event] = []
    while slice_ := inbox.take():
        assert len(slice_) <= EVENTS_PER_STEP
        kinds.append(type(slice_[0]))
        taken += slice_
    assert len(set(kinds[:3])) == 3, "every source gets a slice before any gets its second"
    for kind in set(kinds):
        of_kind = [event for event in queued if isinstance(event, kind)]
        assert [event for event in taken if isinstance(event, kind)] == of_kind
    assert len(inbox) == 0


def test_a_refusal_that_is_already_queued_is_not_queued_again() -> None:
    inbox = EventQueue()
    for port in range(1, 1000):
        inbox.put(replace(REFUSED, flow=replace(FLOW, sport=port), pid=port))
    assert len(inbox) == 1
    inbox.put(replace(REFUSED, policy=1))
    assert len(inbox) == 2
    assert len(inbox.take()) == 2
    inbox.put(REFUSED)
    assert inbox.take() == [REFUSED]


def test_only_refusals_are_limited_in_number() -> None:
    inbox = EventQueue()
    for number in range(2 * REFUSALS):
        inbox.put(refused(number))
    assert len(inbox) == REFUSALS
    for number in range(2 * REFUSALS):
        inbox.put(called(number))
    assert len(inbox) == 3 * REFUSALS
    for event in (SOURCES, connected(), on.CheckDue()):
        inbox.put(event)
    assert len(inbox) == 3 * REFUSALS + 3
