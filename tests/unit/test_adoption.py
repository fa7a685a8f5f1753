"""A dump is adopted in slices, with the notifications that arrived meanwhile."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from ipsecgate.core.gate.kernel_events import KernelEvents
from ipsecgate.core.model.events import (
    KernelSnapshot,
    PolicyGone,
    PolicySet,
    SaGone,
    SaSet,
    SasFlushed,
    XfrmEvent,
)
from ipsecgate.core.model.flow import Selector
from ipsecgate.core.model.ipsec import ESP, Action, Mode, Sa, SaId, SpdEntry, SpdKey
from ipsecgate.core.state.kernel_state import KernelState
from ipsecgate.core.tables.layout import flow_key
from tests.unit.test_spd_table import Hooks, policy, sa
from tests.unit.test_spd_table import flow as flow_to

KEY = SpdKey(Selector(ip_network("10.1.0.0/16"), ip_network("10.2.0.0/16")))
NET = SpdEntry(KEY, 100, Action.PROTECT)
CHANGED = replace(NET, priority=1)
OUT = Sa(SaId(ip_address("192.0.2.2"), 1, ESP), ip_address("192.0.2.1"), 1, Mode.TUNNEL)
OTHER = replace(OUT, id=SaId(ip_address("192.0.2.3"), 2, ESP))


@pytest.mark.parametrize(
    ("events", "policies", "sas"),
    [
        ([], [NET], [OUT]),
        ([PolicySet(CHANGED), SaSet(OTHER)], [CHANGED], [OUT, OTHER]),
        ([PolicyGone(KEY), SaGone(OUT.id)], [], []),
        ([SaSet(OTHER), SaGone(OTHER.id)], [NET], [OUT]),
        ([SaGone(OUT.id), SaSet(OUT)], [NET], [OUT]),
        ([SaGone(OTHER.id)], [NET], [OUT]),
    ],
)
def test_notifications_are_applied_to_the_dump_that_they_overlapped(
    events: list[XfrmEvent], policies: list[SpdEntry], sas: list[Sa]
) -> None:
    state, queue = KernelState(), KernelEvents()
    queue.put(KernelSnapshot((NET,), (OUT,)))
    for event in events:
        queue.put(event)
    while len(queue):
        for taken in queue.take(busy=state.is_adopting):
            if isinstance(taken, KernelSnapshot):
                state.begin(taken)
            else:
                assert isinstance(taken, XfrmEvent)
                state.apply(taken)
        state.adopt(1)
        assert OTHER.id not in state.sas or SaSet(OTHER) in events[-1:]
    while state.is_adopting:
        state.adopt(1)
    assert list(state.policies.values()) == policies
    assert {*state.sas.values()} == {*sas}


def test_a_notification_is_newer_than_the_dump_that_is_being_adopted() -> None:
    state = KernelState()
    state.begin(KernelSnapshot((NET, *map(policy, range(9))), (OUT,)))
    state.adopt(3)
    state.apply(PolicySet(CHANGED))
    state.apply(PolicyGone(policy(8).key))
    state.apply(SaGone(OUT.id))
    state.apply(SaSet(OTHER))
    while state.adopt(2) is None:
        pass
    assert state.policies[KEY] == CHANGED
    assert policy(8).key not in state.policies
    assert list(state.sas) == [OTHER.id]


def test_what_a_dump_does_not_have_is_gone_and_counted() -> None:
    state = KernelState()
    state.replace(KernelSnapshot(tuple(map(policy, range(9))), (OUT,)))
    changed = replace(policy(1), priority=7)
    state.begin(KernelSnapshot((policy(0), changed, *map(policy, range(3, 10))), (OTHER,)))
    drift = None
    while drift is None:
        drift = state.adopt(1)
    # Before and after: one changed, one gone, one new, and an SA instead of another.
    assert drift == 2 + 1 + 1 + 2
    assert state.policies.keys() == {policy(n).key for n in (0, 1, *range(3, 10))}


def test_a_flush_makes_the_dump_void() -> None:
    state = KernelState()
    state.begin(KernelSnapshot((NET,), (OUT, OTHER)))
    state.adopt(2)
    state.apply(SasFlushed())
    assert not state.is_adopting
    assert not state.sas


def test_half_a_dump_opens_nothing() -> None:
    """It has an SA and not yet the policy in front that lets the flow go in clear."""
    state = KernelState()
    state.ike_connected(())
    hooks = Hooks(state)
    hooks.settle()
    bypass = replace(policy(0), priority=1, action=Action.BYPASS, templates=())
    key = flow_key(flow_to(0))
    state.begin(KernelSnapshot((policy(0), bypass), (sa(0),)))
    state.apply(SaSet(sa(0)))
    state.adopt(1)
    assert state.is_adopting
    for command in hooks.spd_table.update(state, between=True):
        hooks.apply(command)
    assert not hooks.is_open(key)
    while state.adopt(1) is None:
        pass
    hooks.settle()
    assert not hooks.is_open(key)
