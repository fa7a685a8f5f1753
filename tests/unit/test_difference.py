"""Two lists of policies compared as sets of flows: against the hooks' own table, flow by flow."""

from __future__ import annotations

import random
from ipaddress import ip_address, ip_network
from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from ipsecgate.core.model.flow import ANY_PORT, Flow, Network
from ipsecgate.core.model.ipsec import Action
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.tables.difference import Difference, Effect, Policies, differences
from ipsecgate.core.tables.layout import flow_key
from ipsecgate.core.tables.policy_rules import matches, rule_of
from ipsecgate.core.tables.table import Table, compile_table, ternary

NETWORKS: list[Network] = [
    ip_network(text)
    for text in (
        "0.0.0.0/0", "10.0.0.0/8", "10.2.0.0/16", "10.2.3.0/30", "10.2.3.2/31", "10.2.3.3/32",
        "255.255.255.255/32", "::/0", "2001:db8::/32", "2001:db8::2/127", "2001:db8::3/128",
    )
]  # fmt: skip
ADDRESSES = [
    ip_address(text)
    for text in (
        "0.0.0.0", "9.255.255.255", "10.0.0.0", "10.2.0.1", "10.2.3.0", "10.2.3.1", "10.2.3.2",
        "10.2.3.3", "10.2.3.4", "10.255.255.255", "255.255.255.255", "::", "2001:db8::",
        "2001:db8::2", "2001:db8::3", "2001:db8::4", "2001:db9::",
    )
]  # fmt: skip
PORTS = (ANY_PORT, (80, 80), (80, 90), (90, 443), (1, 65535), (0, 0))
LOCAL = (ANY_PORT, ANY_PORT, (1024, 2047), (0, 443), (40000, 40001))
EDGES = (0, 1, 79, 80, 81, 89, 90, 91, 443, 444, 65535)
LOCAL_EDGES = (0, 1, 443, 444, 1023, 1024, 2047, 2048, 39999, 40000, 40001, 40002)
PROTOCOLS = (0, 6, 17, 47)


@st.composite
def lists(draw: st.DrawFn) -> Policies:
    policies = draw(
        st.lists(
            st.builds(
                Policy,
                name=st.sampled_from(("a", "b", "c")),
                remote=st.lists(st.sampled_from(NETWORKS), min_size=1, max_size=2).map(tuple),
                action=st.sampled_from(Action),
                proto=st.sampled_from((0, 6, 17)),
                ports=st.sampled_from(PORTS),
                child=st.sampled_from((None, "net")),
                local_ports=st.sampled_from(LOCAL),
            ),
            max_size=5,
        )
    )
    return Policies(tuple(policies), draw(st.booleans()))


def hooks_table(policies: Policies) -> Table:
    """Return the table in which the hooks look up a flow."""
    return compile_table(
        rule_of(policy, place, match)
        for place, policy in enumerate(policies.policies)
        for match in matches(policy)
    )


def judged(policies: Policies, table: Table, flow: Flow) -> tuple[Effect, str | None]:
    entry = table.classify(flow_key(flow))
    if entry is None:
        return (Effect.REFUSE if policies.deny else Effect.ALLOW), None
    policy = policies.policies[entry.id]
    effect = (Effect.ALLOW, Effect.PROTECT, Effect.REFUSE)[
        (Action.BYPASS, Action.PROTECT, Action.DISCARD).index(policy.action)
    ]
    return effect, policy.child if effect is Effect.PROTECT else None


FLOWS = list(product(ADDRESSES, PROTOCOLS[1:], EDGES, LOCAL_EDGES))


@given(lists(), lists(), st.integers(0))
@settings(max_examples=150, deadline=None)
def test_it_is_what_the_hooks_do(old: Policies, new: Policies, seed: int) -> None:
    found = differences(old, new)
    before, after = hooks_table(old), hooks_table(new)
    for daddr, proto, dport, sport in random.Random(seed).sample(FLOWS, 400):
        flow = Flow(daddr, proto, dport, sport=sport)
        one, two = judged(old, before, flow), judged(new, after, flow)
        inside = [each for each in found if each.contains(flow)]
        if one == two:
            assert inside == [], flow
            continue
        (difference,) = inside
        assert (difference.before.effect, difference.after.effect) == (one[0], two[0]), flow
        assert difference.opens is (two[0] < one[0])
        assert difference.closes is (two[0] > one[0])
        if difference.before.policy is not None:
            entry = before.classify(flow_key(flow))
            assert entry is not None
            assert difference.before.policy == old.policies[entry.id].name
        exact = ternary(
            ip_network(daddr), proto=proto, dport=(dport, 0xFFFF), sport=(sport, 0xFFFF)
        )
        assert difference.overlaps(exact)


@given(lists(), lists())
@settings(max_examples=50, deadline=None)
def test_the_reverse_change_closes_what_the_change_opens(old: Policies, new: Policies) -> None:
    there, back = differences(old, new), differences(new, old)
    assert differences(old, old) == []

    def key(one: Difference, reverse: bool) -> tuple[object, ...]:
        ends = (one.after, one.before) if reverse else (one.before, one.after)
        return (*ends, one.networks, one.protocols, one.ports, one.local_ports)

    assert {key(one, False) for one in there} == {key(one, True) for one in back}


def policy(name: str, *remote: str, **more: object) -> Policy:
    return Policy(name, tuple(ip_network(text) for text in remote), **more)  # type: ignore[arg-type]


def test_another_way_to_write_the_same_is_no_difference() -> None:
    one = Policies((policy("net", "10.2.0.0/15", proto=6, ports=(80, 89)),))
    halves = [
        policy(f"{n}-{low}", f"10.{n}.0.0/16", proto=6, ports=(low, low + 4))
        for n in (3, 2)
        for low in (85, 80)
    ]
    late = policy("late", "10.2.0.0/16", action=Action.BYPASS, proto=6, ports=(80, 80))
    assert differences(one, Policies((*halves, late))) == []


def test_a_shadowed_policy_that_moves_up_is_a_difference() -> None:
    wide = policy("net", "10.2.0.0/16")
    printer = policy("printer", "10.2.9.9/32", action=Action.BYPASS, proto=17, ports=(53, 53))
    (found,) = differences(Policies((wide, printer)), Policies((printer, wide)))
    assert found.opens
    assert [str(network) for network in found.networks] == ["10.2.9.9/32"]
    assert (found.protocols.numbers, found.protocols.others) == (frozenset({17}), False)
    assert (found.ports, found.local_ports) == ((53, 53), ANY_PORT)
    assert (found.before.policy, found.after.policy) == ("net", "printer")


def test_ranges_are_joined_again() -> None:
    old = Policies((policy("net", "10.2.0.0/16"),))
    new = Policies((policy("low", "10.2.0.0/17", proto=6), policy("high", "10.2.128.0/17")))
    (found,) = differences(old, new)
    assert [str(network) for network in found.networks] == ["10.2.0.0/17"]
    assert (found.protocols.numbers, found.protocols.others) == (frozenset({6}), True)


def test_a_derived_policy_is_more_open_than_a_configured_one() -> None:
    derived = Policies((policy("net/net", "10.2.0.0/16", derived=True),))
    (found,) = differences(derived, Policies((policy("net", "10.2.0.0/16"),)))
    assert found.closes
    assert found.before.effect is Effect.PROTECT_OR_PASS


def test_thousands_of_policies() -> None:
    many = [policy(f"p{n}", f"10.{n >> 8}.{n & 255}.0/24", proto=6) for n in range(4000)]
    other = [*many[:1234], *many[1235:], many[1234]]
    assert differences(Policies(tuple(many)), Policies(tuple(other))) == []
    (found,) = differences(Policies(tuple(many)), Policies(tuple(other[:-1])))
    assert [str(network) for network in found.networks] == ["10.4.210.0/24"]
