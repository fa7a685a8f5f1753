"""Notifications that arrived during a dump are applied to it."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from ipsecgate.core.model.events import (
    KernelSnapshot,
    PoliciesFlushed,
    PolicyGone,
    PolicySet,
    SaGone,
    SaSet,
    SasFlushed,
    XfrmEvent,
)
from ipsecgate.core.model.flow import Selector
from ipsecgate.core.model.ipsec import ESP, Action, Mode, Sa, SaId, SpdEntry, SpdKey
from ipsecgate.core.state.replay import replay

KEY = SpdKey(Selector(ip_network("10.1.0.0/16"), ip_network("10.2.0.0/16")))
NET = SpdEntry(KEY, 100, Action.PROTECT)
CHANGED = replace(NET, priority=1)
OUT = Sa(SaId(ip_address("192.0.2.2"), 1, ESP), ip_address("192.0.2.1"), 1, Mode.TUNNEL)
OTHER = replace(OUT, id=SaId(ip_address("192.0.2.3"), 2, ESP))


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], KernelSnapshot((NET,), (OUT,))),
        ([PolicySet(CHANGED), SaSet(OTHER)], KernelSnapshot((CHANGED,), (OUT, OTHER))),
        ([PolicyGone(KEY), SaGone(OUT.id)], KernelSnapshot((), ())),
        ([SaSet(OTHER), SaGone(OTHER.id)], KernelSnapshot((NET,), (OUT,))),
        ([SaGone(OUT.id), SaSet(OUT)], KernelSnapshot((NET,), (OUT,))),
        ([SaGone(OTHER.id)], KernelSnapshot((NET,), (OUT,))),
        ([SaSet(OTHER), SasFlushed()], None),
        ([PoliciesFlushed()], None),
    ],
)
def test_notifications_are_applied_to_the_dump_that_they_overlapped(
    events: list[XfrmEvent], expected: KernelSnapshot | None
) -> None:
    assert replay(KernelSnapshot((NET,), (OUT,)), events) == expected
