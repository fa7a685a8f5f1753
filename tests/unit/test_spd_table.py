"""The SPD table as it is published: in parts, of which none opens a flow too early."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate import spd_table
from ipsecgate.core.gate.spd_table import SpdTable
from ipsecgate.core.model.events import PolicySet, SaGone, SaSet, XfrmEvent
from ipsecgate.core.model.flow import TCP, Flow, Selector
from ipsecgate.core.model.ipsec import ESP, Action, Mode, Sa, SaId, SpdEntry, SpdKey, Template
from ipsecgate.core.state.kernel_state import KernelState
from ipsecgate.core.tables.layout import Key, State, flow_key
from ipsecgate.core.tables.table import Table, compile_table
from tests.reference_rules import hook_rules
from tests.unit.random_spd import LOCAL, PEERS, World

NEAR = ip_network("10.1.0.0/16")


class Hooks:
    """What the hooks have, after each command of an SPD table."""

    def __init__(self, state: KernelState) -> None:
        self.state = state
        self.spd_table = SpdTable()
        self.table = Table()

    def update(self) -> None:
        for command in self.spd_table.update(self.state):
            self.apply(command)

    def apply(self, command: do.Command) -> None:
        if isinstance(command, do.Publish):
            self.table = Table()
            for match, entry in command.content.entries():
                self.table.put(match, entry)
        elif isinstance(command, do.Change):
            for match, now in command.entries.items():
                self.table.put(match, now)

    def settle(self) -> None:
        self.update()
        while self.state.pending:
            self.update()

    def is_open(self, key: Key) -> bool:
        return is_live(self.table, key)


def is_live(table: Table, key: Key) -> bool:
    entry = table.classify(key)
    return entry is not None and entry.state is State.LIVE


def test_a_part_of_a_change_opens_no_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spd_table, "POLICIES_PER_UPDATE", 1)
    seen = sum((change_in_parts(seed) for seed in range(12)), Counter[str]())
    assert min(seen["parts"], seen["open"], seen["closed"]) > 500


def change_in_parts(seed: int) -> Counter[str]:
    """Change a small SPD and SAD, several things at a time, and check each part's flows."""
    world = World(seed)
    hooks = Hooks(world.state)
    seen = Counter[str]()
    for _ in range(30):
        keys = {flow: flow_key(flow) for flow in (world.flow() for _ in range(60))}
        hooks.settle()
        was_open = {flow for flow, key in keys.items() if hooks.is_open(key)}
        for _ in range(world.random.randrange(1, 12)):
            world.apply(world.event())
        hooks.update()
        while world.state.pending:
            seen["parts"] += 1
            now_open = {flow for flow, key in keys.items() if hooks.is_open(key)}
            assert now_open <= was_open
            assert {
                flow for flow in keys if hooks.spd_table.state_of(flow) is State.LIVE
            } <= now_open
            hooks.update()
        scratch = compile_table(hook_rules(world.state))
        for key in keys.values():
            assert hooks.is_open(key) == is_live(scratch, key)
            seen["open" if hooks.is_open(key) else "closed"] += 1
    return seen


def policy(number: int, *, spi: int = 0x1000, reqid: int | None = None) -> SpdEntry:
    network = ip_network(f"10.{2 + (number >> 8)}.{number & 255}.0/24")
    template = Template(
        ESP, Mode.TUNNEL, number + 1 if reqid is None else reqid, spi, LOCAL, PEERS[0]
    )
    return SpdEntry(SpdKey(Selector(NEAR, network)), 100, Action.PROTECT, (template,))


def sa(number: int) -> Sa:
    return Sa(SaId(PEERS[0], 0x1000 + number, ESP), LOCAL, reqid=number + 1, mode=Mode.TUNNEL)


def flow(number: int) -> Flow:
    return Flow(ip_address(f"10.2.{number}.9"), TCP, 80, ip_address("10.1.0.1"), 0)


def test_a_bypass_in_front_is_not_overtaken_by_the_sa_behind_it() -> None:
    """Before the change nothing protects the flow, and after it the kernel sends it in clear."""
    state = KernelState()
    state.ike_connected(())
    hooks = Hooks(state)
    hooks.settle()
    behind = replace(policy(0), key=SpdKey(Selector(NEAR, ip_network("10.2.0.0/16"))))
    state.apply(SaSet(sa(0)))
    state.apply(PolicySet(behind))
    for number in range(1, 2 * spd_table.POLICIES_PER_UPDATE):
        state.apply(PolicySet(policy(number)))
    bypass = replace(policy(0), priority=1, action=Action.BYPASS, templates=())
    state.apply(PolicySet(bypass))
    hooks.update()
    while state.pending:
        assert not hooks.is_open(flow_key(flow(0)))
        hooks.update()
    assert not hooks.is_open(flow_key(flow(0)))


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_lost_sa_closes_at_once_whatever_else_changes(first: bool) -> None:
    state = KernelState()
    state.ike_connected(())
    state.apply(PolicySet(policy(0)))
    state.apply(SaSet(sa(0)))
    hooks = Hooks(state)
    hooks.settle()
    assert hooks.is_open(flow_key(flow(0)))
    gone = SaGone(sa(0).id)
    flood = [PolicySet(policy(n)) for n in range(1, 3 * spd_table.POLICIES_PER_UPDATE)]
    events: list[XfrmEvent] = [gone, *flood] if first else [*flood, gone]
    for event in events:
        state.apply(event)
    hooks.update()
    assert state.pending
    assert not hooks.is_open(flow_key(flow(0)))


def test_an_sa_that_is_reported_again_marks_nothing() -> None:
    state = KernelState()
    state.ike_connected(())
    state.apply(PolicySet(policy(0)))
    state.apply(SaSet(sa(0)))
    Hooks(state).settle()
    state.apply(SaSet(sa(0)))
    assert not state.pending


def test_policies_of_one_reqid_do_not_mark_each_other() -> None:
    """Those that name no SPI learn from those that do; manual policies all have reqid 0."""
    state = KernelState()
    state.ike_connected(())
    for number in range(100):
        state.apply(PolicySet(policy(number, reqid=0)))
    Hooks(state).settle()
    state.apply(PolicySet(policy(100, reqid=0)))
    assert len(list(state.changed_rules(1000))) == 1
    state.apply(PolicySet(policy(101, spi=0, reqid=0)))
    state.apply(PolicySet(policy(102, reqid=0)))
    assert len(list(state.changed_rules(1000))) == 2


def test_rules_of_two_policies_count_for_their_peer() -> None:
    state = KernelState()
    for number in (0, 1):
        state.apply(PolicySet(policy(number)))
    other = replace(policy(2), templates=(replace(policy(2).templates[0], daddr=PEERS[1]),))
    state.apply(PolicySet(other))
    keys = [policy(number).key for number in range(3)]
    assert state.peer_of(frozenset(keys[:2])) == PEERS[0]
    assert state.peer_of(frozenset(keys[1:])) == frozenset(PEERS)
