"""The compiled table gives the same answer as a first-match search through the rules."""

from __future__ import annotations

from ipaddress import ip_network

from hypothesis import given
from hypothesis import strategies as st

from ipsecgate.core.tables.layout import Entry, Key, State
from ipsecgate.core.tables.table import (
    Rule,
    Ternary,
    compile_table,
    port_masks,
    ternary,
)
from tests.unit.random_rules import flows, ternaries


@given(st.lists(ternaries(), max_size=12), st.lists(flows(), min_size=1, max_size=20))
def test_the_compiled_table_equals_a_first_match_search(
    matches: list[Ternary], keys: list[Key]
) -> None:
    rules = [Rule(match, Entry(State.PROTECT, id=i)) for i, match in enumerate(matches)]
    table = compile_table(rules)
    for key in keys:
        first = next((rule.entry for rule in rules if rule.match.matches(key)), None)
        found = table.classify(key)
        assert (found and found.id) == (first and first.id)


@given(ternaries(), ternaries(), flows())
def test_an_intersection_matches_what_both_match(a: Ternary, b: Ternary, key: Key) -> None:
    both = a.intersect(b)
    assert (both is not None and both.matches(key)) == (a.matches(key) and b.matches(key))


@given(st.integers(0, 65535), st.integers(0, 65535))
def test_port_blocks_cover_exactly(a: int, b: int) -> None:
    low, high = sorted((a, b))
    blocks = port_masks(low, high)
    assert sum(0x10000 - mask for _, mask in blocks) == high - low + 1
    for port in {0, low, high, max(low - 1, 0), min(high + 1, 65535), (low + high) // 2}:
        hit = any(port & mask == value for value, mask in blocks)
        assert hit == (low <= port <= high)


def test_rules_of_one_mask_share_a_row() -> None:
    networks = [ip_network(f"10.{i}.0.0/16") for i in range(100)]
    table = compile_table(Rule(ternary(n), Entry(State.LIVE)) for n in networks)
    assert len(table.rows) == 1
