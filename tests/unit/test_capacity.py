"""More rules than the hook tables hold: some are closed or widened, no other verdict changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address, ip_network
from itertools import product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipsecgate.core.codec.vici_selectors import Names, selectors
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import TCP, UDP, Flow, Selector, TrafficSelector
from ipsecgate.core.model.ipsec import ESP, Action, ChildName, SaId, SpdKey
from ipsecgate.core.model.policy import Policy, Settings
from ipsecgate.core.state.spd import DEAD, LIVE
from ipsecgate.core.tables import capacity, table
from ipsecgate.core.tables.capacity import fit_policies, fit_spd
from ipsecgate.core.tables.layout import Entry, Key, State, TableId, flow_key
from ipsecgate.core.tables.policy_rules import matches, policy_rules
from ipsecgate.core.tables.table import Rule, Ternary
from tests.unit.random_rules import flows, ternaries
from tests.unit.transcript import (
    LISTED,
    ROUTED,
    SA,
    SOURCES,
    TRAP,
    Transcript,
    connected,
)

STRICT = {None: 0, State.BYPASS: 0, State.PROTECT: 1, State.DISCARD: 2}
FEW = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (capacity, table):
        monkeypatch.setattr(module, "TUPLES", 4)
        monkeypatch.setattr(module, "LIMIT", 8)
    monkeypatch.setattr(capacity, "BUDGETS", (2, 1, 0))


def first(rules: Sequence[Rule], key: Key) -> Rule | None:
    return next((rule for rule in rules if rule.match.matches(key)), None)


@st.composite
def owned(draw: st.DrawFn) -> list[Rule]:
    """Draw the rules of several owners: live parts of a selector, and the rest of it dead."""
    rules = []
    for owner in range(draw(st.integers(1, 8))):
        selector = draw(ternaries())
        parts = [selector.intersect(part) for part in draw(st.lists(ternaries(), max_size=4))]
        rules += [Rule(part, LIVE, owner) for part in parts if part is not None]
        rules.append(Rule(selector, DEAD, owner))
    return rules


@FEW
@given(owned(), st.lists(flows(), min_size=1, max_size=30), st.integers(1, 8))
def test_a_selector_that_fits_keeps_its_verdicts_when_others_are_closed(
    small: None, rules: list[Rule], keys: list[Key], peers: int
) -> None:
    made, closed = fit_spd(rules, lambda owner: owner % peers)
    assert len(made.masks) <= 4
    assert len(made.entries) <= 8
    for key in keys:
        rule, entry = first(rules, key), made.classify(key)
        live = rule is not None and rule.entry is LIVE and rule.owner not in closed
        assert (entry is not None and entry.state is State.LIVE) == live


@st.composite
def operators(draw: st.DrawFn) -> list[Policy]:
    low = st.integers(0, 7)
    return [
        Policy(
            f"p{number}",
            tuple(
                ip_network((draw(low) << 29 & ~0 << 32 - bits & 0xFFFFFFFF, bits))
                for bits in draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
            ),
            draw(st.sampled_from(tuple(Action))),
            draw(st.sampled_from((0, TCP, UDP))),
            draw(st.sampled_from(((0, 65535), (0, 3), (1, 6), (5, 5)))),
        )
        for number in range(draw(st.integers(1, 6)))
    ]


KEYS = [
    flow_key(Flow(ip_address(high << 29), proto, port))
    for high, proto, port in product(range(8), (TCP, UDP), range(8))
]


@FEW
@given(operators())
def test_a_policy_that_does_not_fit_only_becomes_stricter(
    small: None, policies: list[Policy]
) -> None:
    rules = policy_rules(policies, {})
    made, widened = fit_policies(policies)
    shadows = [
        policy
        for place, policy in enumerate(policies)
        if policy in widened or any(_meet(other, policy) for other in policies[:place]
                                    if other in widened)
    ]  # fmt: skip
    for key in KEYS:
        rule, entry = first(rules, key), made.classify(key)
        before = rule.entry if rule else None
        state = entry.state if entry else None
        assert STRICT[state] >= STRICT[before.state if before else None]
        if before is not None and policies[before.id] not in shadows:
            assert entry == before
        if not widened:
            assert entry == before


def _meet(one: Policy, other: Policy) -> bool:
    return any(a.intersect(b) for a in matches(one) for b in matches(other))


# --- cases found in the field -----------------------------------------------------------


PORT_NAMES = Names(protocol=int, service=lambda name, _protocol: int(name))


def ranged(net: str) -> tuple[TrafficSelector, ...]:
    return selectors([f"10.{net}.0.10..10.{net}.0.250"], (), PORT_NAMES)


def test_a_peer_that_negotiates_an_address_range_closes_only_its_own_flows() -> None:
    """51 masks where the hooks hold 32: once, every flow of every peer was refused."""
    other = ip_address("192.0.2.3")
    key = SpdKey(Selector(ip_network("10.1.0.0/24"), ip_network("10.7.0.0/24")))
    template = replace(TRAP.templates[0], reqid=2, daddr=other)
    policy = replace(TRAP, key=key, priority=TRAP.priority - 16, templates=(template,))
    sa = replace(SA, id=SaId(other, 0x2000, ESP), reqid=2)
    listed = replace(
        LISTED, name=ChildName("range", "net"), reqid=2, spi_out=0x2000, remote_host=other,
        local=ranged("1"), remote=ranged("7"),
    )  # fmt: skip
    theirs = replace(ROUTED, daddr=ip_address("10.7.0.11"), saddr=ip_address("10.1.0.20"))
    for exact, both in ((listed.remote, False), (listed.remote[:3], True)):
        transcript = Transcript()
        fits = replace(listed, local=listed.local[:3], remote=exact) if both else listed
        kernel = on.KernelSnapshot((TRAP, policy), (SA, sa))
        transcript.after(kernel, connected(LISTED, fits), SOURCES)
        assert transcript.is_open()
        entry = transcript.entry(TableId.SPD, theirs)
        assert (entry is not None and entry.state is State.LIVE) == both
        named = [error for error in transcript.gate.errors if "range/net" in error]
        assert bool(named) != both
        assert not any("peer/net" in error for error in transcript.gate.errors)


def test_a_peer_with_many_selectors_closes_only_its_own_flows() -> None:
    """Each child needs few masks; together they need too many."""
    other = ip_address("192.0.2.3")
    many = tuple(
        replace(
            TRAP,
            key=SpdKey(Selector(ip_network(f"10.1.0.0/{near}"), ip_network(f"10.7.0.0/{far}"))),
            priority=100 - near - far,
            templates=(replace(TRAP.templates[0], daddr=other, reqid=2),),
        )
        for near in range(17, 25)
        for far in range(17, 25)
    )
    sa = replace(SA, id=SaId(other, 0x2000, ESP), reqid=2)
    listed = replace(LISTED, reqid=2, spi_out=0x2000, remote_host=other,
                   remote=(TrafficSelector(ip_network("10.7.0.0/16")),))  # fmt: skip
    transcript = Transcript()
    kernel = on.KernelSnapshot((*many, TRAP), (SA, sa))
    transcript.after(kernel, connected(LISTED, listed), SOURCES)
    assert transcript.is_open()
    closed = replace(ROUTED, saddr=ip_address("10.1.8.1"), daddr=ip_address("10.7.4.1"))
    assert not transcript.is_open(closed)
    (error,) = transcript.gate.errors
    assert "peer/net (10.1.0.0/20 to 10.7.0.0/21, peer 192.0.2.3)" in error
    assert f"peer {LISTED.remote_host}" not in error
    assert error.endswith(" and 25 more")


def test_a_closed_selector_still_hides_the_ones_behind_it() -> None:
    """The kernel sends these flows by the narrower policy, so the wider one must not open them."""
    parts = [
        Ternary(Key(family=4, dport=n), Key(family=0xFF, dport=0xFFFF, sport=n)) for n in range(40)
    ]
    rules = [Rule(part, LIVE, "narrow") for part in parts]
    narrow = Ternary(Key(family=4, proto=6), Key(family=0xFF, proto=0xFF))
    wide = Ternary(Key(family=4), Key(family=0xFF))
    rules = [replace(r, match=r.match.intersect(narrow) or narrow) for r in rules]
    rules += [Rule(narrow, DEAD, "narrow"), Rule(wide, LIVE, "wide"), Rule(wide, DEAD, "wide")]
    made, closed = fit_spd(rules, lambda owner: owner)
    assert closed == ["narrow"]
    assert made.classify(Key(family=4, proto=6)) == DEAD
    assert made.classify(Key(family=4, proto=17)) == LIVE


def test_entries_beyond_the_table_limit_are_closed() -> None:
    one = Ternary(Key(family=4), Key(family=0xFF, daddr=0xFFFFFFFF))
    rules = [
        Rule(replace(one, value=Key(family=4, daddr=n)), LIVE, n) for n in range(table.LIMIT + 9)
    ]
    made, closed = fit_spd(rules, lambda owner: owner)
    assert len(made.entries) == table.LIMIT
    assert len(closed) == 9


def test_a_policy_with_too_many_masks_is_the_only_one_widened() -> None:
    big = Policy("big", (ip_network("10.9.0.0/16"),), proto=TCP, ports=(1, 65534))
    other = replace(big, name="other", remote=(ip_network("10.8.0.0/17"),), ports=(1, 254))
    third = replace(big, name="third", remote=(ip_network("10.7.0.0/18"),), ports=(1, 1022))
    beside = Policy("beside", (ip_network("10.9.1.0/24"),), Action.BYPASS, proto=UDP)
    inside = Policy("inside", (ip_network("10.9.2.0/24"),), Action.BYPASS)
    transcript = Transcript(Settings(policies=(big, other, third, beside, inside)))
    base = replace(ROUTED, daddr=ip_address("10.9.3.3"))
    udp = replace(base, proto=UDP)
    assert transcript.entry(TableId.POLICY, base) == Entry(State.PROTECT, 1, 0)
    far = replace(base, daddr=ip_address("10.10.0.1"))
    assert transcript.entry(TableId.POLICY, far) is None, "no policy names it"
    at = transcript.entry(TableId.POLICY, replace(udp, daddr=ip_address("10.9.1.1")))
    assert at is not None
    assert at.state is State.BYPASS, "it shares no flow with the widened policy"
    at = transcript.entry(TableId.POLICY, replace(base, daddr=ip_address("10.9.2.1")))
    assert at is not None
    assert at.state is State.PROTECT, "first match wins"
    (error,) = transcript.gate.errors
    assert "POLICY table" in error
    assert error.endswith("because of big")
