"""Folded notifications lead to the same state, and what is gone goes first and stays gone."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from ipsecgate.core.gate.kernel_events import SLICE, KernelEvents
from ipsecgate.core.model import events as on
from ipsecgate.core.model.ipsec import Sa, SaId, SpdEntry, SpdKey
from ipsecgate.core.state.kernel_state import KernelState
from tests.unit.test_spd_table import policy, sa
from tests.unit.transcript import SA


def spi(number: int, again: int = 0) -> Sa:
    return replace(SA, id=replace(SA.id, spi=0x1000 + number), installed_at=again)


def test_little_is_handed_out_as_it_came() -> None:
    events = KernelEvents()
    came: list[on.XfrmEvent] = [on.PolicySet(policy(0)), on.SaGone(SA.id), on.SaSet(spi(1))]
    for event in came:
        events.put(event)
    assert events.take(busy=False) == came
    assert not events.is_between
    assert events.take(busy=False) == []


def test_the_last_notification_for_an_object_counts() -> None:
    events = KernelEvents()
    for again in range(1000):
        events.put(on.SaSet(spi(0, again)))
        events.put(on.PolicySet(replace(policy(0), index=again)))
    assert len(events) == 2
    assert events.take(busy=False) == [
        on.SaSet(spi(0, 999)), on.PolicySet(replace(policy(0), index=999)),
    ]  # fmt: skip


def test_a_batch_is_handed_out_in_slices_and_what_came_meanwhile_after_it() -> None:
    events = KernelEvents()
    for number in range(2 * SLICE):
        events.put(on.SaSet(spi(number)))
    assert len(events.take(busy=False)) == SLICE
    assert events.is_between
    events.put(on.SaSet(spi(0, 7)))
    assert len(events.take(busy=False)) == SLICE
    assert len(events) == 1, "the batch was all that there was"
    assert events.take(busy=False) == [on.SaSet(spi(0, 7))]


@pytest.mark.parametrize("busy", [False, True])
def test_an_sa_that_is_gone_goes_first_and_stays_gone(busy: bool) -> None:
    events = KernelEvents()
    for number in range(2 * SLICE):
        events.put(on.SaSet(spi(number)))
    events.take(busy=False)
    last = spi(2 * SLICE - 1)
    events.put(on.SaGone(last.id))
    taken = events.take(busy=busy)
    assert taken[0] == on.SaGone(last.id)
    assert len(taken) == (1 if busy else SLICE), "all others of the slice, but not that SA"
    while len(events):
        taken = events.take(busy=False)
        assert on.SaSet(last) not in taken


def test_an_sa_that_is_gone_does_not_come_back_with_a_dump() -> None:
    events, state = KernelEvents(), KernelState()
    events.put(on.KernelSnapshot((), (SA,)))
    events.put(on.SaGone(SA.id))
    apply(state, events.take(busy=False))
    assert not state.sas


def test_a_flush_makes_void_what_came_before_it() -> None:
    events = KernelEvents()
    for number in range(2 * SLICE):
        events.put(on.PolicySet(policy(number)))
    events.put(on.SaSet(SA))
    events.take(busy=False)
    events.put(on.PolicySet(policy(0)))
    events.put(on.PoliciesFlushed())
    events.put(on.PolicySet(policy(1)))
    state = KernelState()
    while len(events):
        apply(state, events.take(busy=False))
    assert list(state.policies) == [policy(1).key]
    assert list(state.sas) == [SA.id]


def apply(state: KernelState, taken: list[on.Event]) -> None:
    for event in taken:
        if isinstance(event, on.KernelSnapshot):
            state.begin(event)
        else:
            assert isinstance(event, on.XfrmEvent)
            state.apply(event)
    while state.is_adopting:
        state.adopt()


@pytest.mark.parametrize("seed", range(20))
def test_the_state_is_that_of_all_notifications_in_order(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ipsecgate.core.gate.kernel_events.SLICE", 3)
    random, events, state, kernel = Random(seed), KernelEvents(), KernelState(), KernelState()
    dump = on.KernelSnapshot((), ())
    genuine = 0
    past = [contents(kernel)]
    gone: set[SaId] = set()
    for _ in range(2000):
        if random.random() < 0.6:
            event = notification(random, kernel)
            if isinstance(event, on.KernelSnapshot):
                dump = event
            else:
                kernel.apply(event)
            events.put(event)
            if isinstance(event, on.SaGone):
                gone.add(event.id)
            elif isinstance(event, on.SaSet):
                gone.discard(event.sa.id)
            past.append(contents(kernel))
            continue
        apply(state, events.take(busy=random.random() < 0.2))
        assert not gone & state.sas.keys(), f"seed {seed}: an SA came back"
        if not events.is_between and not events.is_pressing:
            # SAs may be gone already, but nothing else differs from a state that the kernel had.
            now = contents(state)
            assert any(
                now[0] == policies and now[1].items() <= sas.items() for policies, sas in past
            )
            genuine += 1
    while len(events):
        apply(state, events.take(busy=False))
    assert contents(state) == contents(kernel)
    assert genuine > 50
    assert dump.policies


def contents(state: KernelState) -> tuple[dict[SpdKey, SpdEntry], dict[SaId, Sa]]:
    return dict(state.policies), dict(state.sas)


def notification(random: Random, kernel: KernelState) -> on.XfrmEvent | on.KernelSnapshot:
    number = random.randrange(12)
    match random.randrange(60):
        case 0:
            return on.KernelSnapshot(tuple(kernel.policies.values()), tuple(kernel.sas.values()))
        case one if one < 20:
            return on.PolicySet(replace(policy(number), priority=random.randrange(9)))
        case one if one < 30:
            return on.PolicyGone(policy(number).key)
        case one if one < 45:
            return on.SaSet(replace(sa(number), installed_at=random.randrange(9)))
    return on.SaGone(sa(number).id)
