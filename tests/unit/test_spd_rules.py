"""The SPD's rules, kept up to date policy by policy, equal those made from scratch."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from ipsecgate.core.model.events import (
    PolicyGone,
    PolicySet,
    SaGone,
    SaSet,
)
from ipsecgate.core.model.flow import Selector
from ipsecgate.core.model.ipsec import (
    ESP,
    Action,
    Mode,
    Sa,
    SaId,
    SpdEntry,
    SpdKey,
    Template,
)
from ipsecgate.core.state.kernel_state import KernelState
from ipsecgate.core.tables.layout import Entry, State, flow_key
from ipsecgate.core.tables.table import compile_table
from tests.reference_rules import hook_rules, kernel_rules, rules_from_scratch
from tests.unit.random_spd import LOCAL, PEERS, World

EVENTS, FLOWS = 300, 60


def verdict(entry: Entry | None) -> tuple[State | None, int]:
    return (entry.state, entry.deadline) if entry else (None, 0)


def test_after_every_notification_the_table_is_the_one_made_from_scratch() -> None:
    seen = set().union(*(states_after_every_notification(seed) for seed in range(12)))
    assert seen == {State.LIVE, State.DEAD, State.PASS, None}


def states_after_every_notification(seed: int) -> set[State | None]:
    world = World(seed)
    seen: set[State | None] = set()
    for _ in range(EVENTS):
        world.apply(world.event())
        while world.state.pending:
            world.take(limit=world.random.choice((1, 100)))
        scratch = compile_table(hook_rules(world.state))
        for _ in range(FLOWS // 10):
            flow = world.flow()
            key = flow_key(flow)
            now, then = world.rules.table.classify(key), scratch.classify(key)
            assert verdict(now) == verdict(then), f"seed {seed}: {flow}"
            seen.add(now.state if now else None)
    return seen


@pytest.mark.parametrize("seed", range(3))
def test_what_it_reports_as_changed_is_all_that_changed(seed: int) -> None:
    world = World(seed)
    mirror: dict[object, Entry] = {}
    for _ in range(EVENTS):
        event = world.event()
        if isinstance(event, PolicySet | PolicyGone | SaSet | SaGone):
            world.state.apply(event)
        world.take(limit=100)
        for match, (_before, now) in world.rules.changes().items():
            if now is None:
                del mirror[match]
            else:
                mirror[match] = now
        assert mirror == dict(world.rules.table.entries())
    assert mirror


def test_a_notification_touches_only_the_policies_of_its_reqid() -> None:
    state = KernelState()
    state.ike_connected(())
    far = [ip_network(f"10.{n >> 8}.{n & 255}.0/24") for n in range(2000)]
    for n, network in enumerate(far):
        template = Template(ESP, Mode.TUNNEL, n + 1, 0x1000, LOCAL, PEERS[0])
        key = SpdKey(Selector(ip_network("10.200.0.0/16"), network))
        state.apply(PolicySet(SpdEntry(key, 100, Action.PROTECT, (template,))))
    assert len({owner for owner, _ in state.changed_rules(10_000)}) == len(far)
    state.apply(SaSet(Sa(SaId(PEERS[0], 0x1000, ESP), LOCAL, reqid=7, mode=Mode.TUNNEL)))
    ((owner, rules),) = state.changed_rules(10_000)
    assert owner in state.policies
    assert State.LIVE in {rule.entry.state for rule in rules}


def test_the_rules_are_the_kernels_own_where_nothing_is_narrowed() -> None:
    """`rules` is what the oracle compares with the kernel, so both must come from one place."""
    world = World(1)
    for _ in range(EVENTS):
        event = world.event()
        if isinstance(event, PolicySet | PolicyGone | SaSet | SaGone):
            world.state.apply(event)
    sas = world.state.confirmed_sas()
    assert kernel_rules(world.state) == rules_from_scratch(world.state.policies.values(), sas)
