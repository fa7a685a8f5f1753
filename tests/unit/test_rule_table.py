"""A table of rules by owner: what fits is exact, and what does not is refused, alone."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from ipaddress import ip_network

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipsecgate.core.tables.layout import Entry, Key, State
from ipsecgate.core.tables.rule_table import COARSE_ENTRIES, COARSE_MASKS, RETRIES, RuleTable
from ipsecgate.core.tables.table import Rule, Ternary, better, ternary
from tests.unit.random_rules import flows, ternaries
from tests.unit.test_flat import calls

LIVE, DEAD = State.LIVE, State.DEAD
FEW = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])


def close(rules: tuple[Rule, ...]) -> list[Rule]:
    return [Rule(rule.match, replace(rule.entry, state=DEAD, rank=0)) for rule in rules]


def table(masks: int = 100, entries: int = 1000) -> RuleTable:
    return RuleTable(close, masks + COARSE_MASKS, entries + COARSE_ENTRIES)


@st.composite
def owners(draw: st.DrawFn) -> list[list[Rule]]:
    """Draw the rules of some owners, each live or dead, of few ranks."""
    rules = st.builds(
        lambda match, state, rank, deadline: Rule(match, Entry(state, 0, 0, deadline, rank)),
        ternaries(), st.sampled_from((LIVE, DEAD)), st.integers(1, 6), st.sampled_from((0, 100)),
    )  # fmt: skip
    return draw(st.lists(st.lists(rules, max_size=4), max_size=6))


def best(rules: Sequence[Rule], key: Key) -> Entry | None:
    """Return the entry that wins, found by trying all rules."""
    found: Entry | None = None
    for rule in rules:
        if rule.match.matches(key) and (found is None or better(rule.entry, found)):
            found = rule.entry
    return found


def same(one: Entry | None, other: Entry | None) -> bool:
    """Return whether neither of two entries is better; two of one rank may differ in state."""
    if one is None or other is None:
        return one is other
    return one.rank == other.rank


@FEW
@given(owners(), owners(), st.lists(flows(), min_size=1, max_size=30))
def test_assigning_again_gives_the_table_of_the_last_rules(
    first: list[list[Rule]], second: list[list[Rule]], keys: list[Key]
) -> None:
    rules = table()
    for assigned in (first, second):
        for owner in range(6):
            rules.assign(owner, assigned[owner] if owner < len(assigned) else ())
    everything = [rule for its in second for rule in its]
    assert all(same(rules.table.classify(key), best(everything, key)) for key in keys)
    for owner in range(6):
        rules.assign(owner, ())
    assert rules.table.rows == {}
    assert rules.table.size == 0


@FEW
@given(owners(), st.lists(flows(), min_size=1, max_size=30))
def test_what_does_not_fit_opens_nothing(assigned: list[list[Rule]], keys: list[Key]) -> None:
    rules = table(masks=3, entries=6)
    for owner, its in enumerate(assigned):
        rules.assign(owner, its)
    everything = [rule for its in assigned for rule in its]
    states = {key: best(everything, key) for key in keys}
    for key, wanted in states.items():
        found = rules.table.classify(key)
        if (found is not None and found.state is LIVE) or not rules.closed:
            assert same(found, wanted)


def one_of_a_mask(number: int, owner: int = 0) -> Rule:
    network = ip_network(((0x2001 + owner) << 112, 33 + number))
    return Rule(ternary(network, proto=6), Entry(LIVE, rank=5))


def key_of(rule: Rule) -> Key:
    return rule.match.value.replaced(proto=6)


def state(rules: RuleTable, rule: Rule) -> State | None:
    entry = rules.table.classify(key_of(rule))
    return entry.state if entry else None


def test_an_owner_without_room_is_closed_alone_and_opened_when_there_is_room() -> None:
    rules = table(masks=3)
    kept = [one_of_a_mask(n, owner=n + 1) for n in range(3)]
    for owner, rule in enumerate(kept):
        rules.assign(owner, [rule])
    late = one_of_a_mask(20, owner=9)
    rules.assign("late", [late])
    assert list(rules.closed) == ["late"]
    assert state(rules, late) is DEAD
    assert [state(rules, rule) for rule in kept] == [LIVE] * 3
    rules.assign(0, [])
    assert not rules.closed
    assert state(rules, late) is LIVE


def test_an_owner_beyond_the_entries_is_closed() -> None:
    rules = table(entries=4)
    for owner in range(6):
        rules.assign(owner, [Rule(ternary(ip_network(f"10.{owner}.0.0/16")), Entry(LIVE, rank=5))])
    assert list(rules.closed) == [4, 5]


def test_a_peer_cannot_use_up_the_masks() -> None:
    """The masks are what a peer negotiates; those that it shares with others are not counted."""
    rules = table(masks=80)
    greedy: list[Hashable] = [("greedy", n) for n in range(30)]
    for number, owner in enumerate(greedy):
        rules.assign(owner, [one_of_a_mask(number)], peer="greedy")
    assert set(rules.closed) == set(greedy[10:])
    other = one_of_a_mask(40, owner=7)
    rules.assign("other", [other], peer="other")
    assert state(rules, other) is LIVE
    shared = one_of_a_mask(3, owner=8)
    rules.assign("shared", [shared], peer="greedy")
    assert state(rules, shared) is LIVE


def test_equal_rules_of_two_owners_are_one_entry_until_both_are_gone() -> None:
    rules = table()
    rule = one_of_a_mask(1)
    longer = replace(rule, entry=replace(rule.entry, deadline=0))
    rules.assign(1, [replace(rule, entry=replace(rule.entry, deadline=50))])
    rules.assign(2, [longer])
    assert rules.table.get(rule.match) == longer.entry, "the longer-lived one"
    rules.changes()
    rules.assign(2, [])
    ((match, (before, now)),) = rules.changes().items()
    assert (match, before, now and now.deadline) == (rule.match, longer.entry, 50)
    rules.assign(1, [])
    assert rules.table.get(rule.match) is None


def test_what_changes_back_is_no_change() -> None:
    rules = table()
    rule = one_of_a_mask(1)
    rules.assign(1, [rule])
    rules.changes()
    rules.assign(1, [])
    rules.assign(1, [rule])
    assert rules.changes() == {}


@pytest.mark.parametrize("bits", [0, 3, 8, 17, 64, 128])
def test_a_closing_rule_contains_the_region_that_it_closes(bits: int) -> None:
    rules = table(masks=0)
    network = ip_network(f"2001:db8::/{bits}", strict=False)
    rules.assign(1, [Rule(ternary(network, proto=6), Entry(LIVE, rank=5))])
    ((closing, entry),) = rules.table.entries()
    assert entry.state is DEAD
    assert closing.mask.daddr.bit_count() == bits // 8 * 8
    assert Ternary(closing.value, closing.mask).matches(ternary(network).value)


def test_all_closed_owners_are_tried_again_when_others_have_made_space() -> None:
    """One call tries a few of them; nothing needs to be assigned for the next few."""
    rules = table(entries=100)
    host = ip_network("10.0.0.0/32").network_address
    many = [[Rule(ternary(ip_network(host + n)), Entry(LIVE, rank=5))] for n in range(200)]
    rules.assign("large", [rule for its in many[:100] for rule in its])
    for number in range(100, 200):
        rules.assign(number, many[number])
    assert len(rules.closed) == 100
    assert not rules.retry(), "there is no space yet"
    rules.assign("large", ())
    assert 0 < len(rules.closed) < 100
    tries = 1
    while rules.retry():
        tries += 1
    assert not rules.closed
    assert tries >= 100 // RETRIES - 1
    assert all(state(rules, its[0]) is LIVE for its in many[100:])


def test_a_rule_that_many_closed_owners_share_goes_at_a_price_that_does_not_grow() -> None:
    counted = []
    for owners_ in (100, 1000):
        rules = table(masks=0)
        host = ip_network("10.0.0.0/26").network_address
        for number in range(owners_):
            network = ip_network((int(host) + number % 64, 32))
            match = ternary(network, proto=6, dport=(number, 0xFFFF))
            rules.assign(number, [Rule(match, Entry(LIVE, rank=7))])
        assert len(rules.closed) == owners_
        counted.append(calls(lambda r=rules: r.assign(0, ())))  # type: ignore[misc]
    assert counted[1] <= counted[0] + 8
