"""Which flows have another SA in place of the one that is gone: `core.state.successors`."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from ipsecgate.core.model.flow import Selector
from ipsecgate.core.model.ipsec import (
    ESP,
    Action,
    Direction,
    Mode,
    Sa,
    SaId,
    SpdEntry,
    SpdKey,
    Template,
)
from ipsecgate.core.state.spd import LIVE, rules_of, sa_tag
from ipsecgate.core.state.successors import protected_again
from ipsecgate.core.tables.layout import Entry
from ipsecgate.core.tables.table import Ternary

HERE, PEER = ip_address("192.0.2.1"), ip_address("192.0.2.2")
OLD = Sa(SaId(PEER, 0x1000, ESP), HERE, reqid=1, mode=Mode.TUNNEL)
NEW = replace(OLD, id=SaId(PEER, 0x2000, ESP))
KEY = SpdKey(Selector(ip_network("10.1.0.0/24"), ip_network("10.2.0.0/24")))
POLICY = SpdEntry(KEY, 100, Action.PROTECT, (Template(ESP, Mode.TUNNEL, 1, 0, HERE, PEER),))
OTHER = replace(KEY, selector=replace(KEY.selector, dst=ip_network("10.3.0.0/24")))


def live() -> dict[Ternary, Entry]:
    """Return what a predecessor published of the old SA."""
    rules = rules_of(POLICY, lambda reqid: (OLD,) if reqid == 1 else ())
    found = {rule.match: rule.entry for rule in rules if rule.entry.state is LIVE.state}
    assert [entry.id for entry in found.values()] == [sa_tag(OLD.id)]
    return found


@pytest.mark.parametrize(
    ("policy", "sa", "is_protected"),
    [
        (POLICY, NEW, True),
        (replace(POLICY, key=replace(KEY, selector=replace(KEY.selector, proto=6))), NEW, False),
        (replace(POLICY, key=OTHER), NEW, False),
        (replace(POLICY, key=replace(KEY, direction=Direction.IN)), NEW, False),
        (replace(POLICY, priority=99), NEW, False),
        (replace(POLICY, action=Action.DISCARD), NEW, False),
        (POLICY, replace(NEW, reqid=2), False),
        (POLICY, replace(NEW, larval=True), False),
        (POLICY, replace(NEW, saddr=ip_address("192.0.2.9")), False),
    ],
)
def test_a_region_is_protected_again_if_its_policy_has_a_state(
    policy: SpdEntry, sa: Sa, is_protected: bool
) -> None:
    entries = live()
    found = protected_again(entries, [policy], lambda reqid: (sa,) if reqid == sa.reqid else ())
    assert found == (entries.keys() if is_protected else set())
