"""Where routing leads flows, and which lookups of the SPD decide about them."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address
from itertools import product

import pytest

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.routing import ORIGINS, Routing
from ipsecgate.core.model.events import OriginGone, PathsResolved
from ipsecgate.core.model.flow import HOST, Flow, FlowPath, Origin
from ipsecgate.core.tables.layout import Reason, State
from ipsecgate.core.tables.verdict import verdict
from tests.unit.transcript import FLOW, REFUSED, ROUTED, SOURCES, THERE, Transcript

HERE, NEW = ip_address("10.1.0.1"), ip_address("192.0.2.1")
CONTAINER = Origin(netns=77)
ABROAD = replace(FLOW, netns=77)
BOUND = replace(FLOW, saddr=ip_address("10.1.0.5"))


def routing(path: FlowPath, origin: Origin = HOST, *, by_source: bool = False) -> Routing:
    made = Routing()
    made.follow((THERE,))
    made.resolved(PathsResolved(((THERE, path),), origin, by_source, marks=0xFF))
    return made


def test_an_unbound_flow_gets_the_source_of_its_path() -> None:
    routed = routing(FlowPath(HERE)).route(FLOW)
    assert routed.lookups == (ROUTED,)
    assert routing(FlowPath(None)).route(FLOW).reason is Reason.REFUSE_NO_SOURCE


def test_an_unknown_origin_is_refused_and_asked_for() -> None:
    made = routing(FlowPath(HERE))
    marked = replace(FLOW, mark=7)
    assert made.route(marked).reason is Reason.REFUSE_NO_SOURCE
    assert made.route(ABROAD).reason is Reason.REFUSE_NETNS
    assert made.want(marked, 1) == [do.FollowOrigin(Origin(mark=7), 1)]
    assert made.want(ABROAD, 2) == [do.FollowOrigin(CONTAINER, 2)]
    assert made.want(FLOW, 1) == []
    elsewhere = replace(marked, daddr=ip_address("10.99.0.1"))
    assert made.want(elsewhere, 1) == [], "no policy protects it"


@pytest.mark.parametrize(
    ("path", "again"),
    [
        (FlowPath(HERE, if_id=5), replace(ROUTED, if_id=5)),
        (FlowPath(HERE, mark=42), replace(ROUTED, mark=42)),
        (FlowPath(HERE, translated=NEW), replace(ROUTED, saddr=NEW)),
        (FlowPath(HERE, if_id=5, translated=NEW), replace(ROUTED, saddr=NEW, if_id=5)),
    ],
)
def test_a_tunnel_device_and_a_translation_look_up_the_spd_again(
    path: FlowPath, again: Flow
) -> None:
    assert routing(path).route(FLOW).lookups == (ROUTED, again)


def test_a_translated_flow_may_get_another_port() -> None:
    flow = replace(FLOW, saddr=HERE, sport=40000)
    (first, again) = routing(FlowPath(HERE, translated=NEW)).route(flow).lookups
    assert (first.sport, again.sport) == (40000, 0)


def test_a_bound_flow_needs_its_path_only_where_paths_are_not_plain() -> None:
    assert routing(FlowPath(HERE)).route(BOUND).lookups == (BOUND,)
    assert routing(FlowPath(HERE), by_source=True).route(BOUND).lookups == (BOUND,)
    tunnel = FlowPath(HERE, if_id=5)
    assert routing(tunnel).route(BOUND).lookups == (BOUND, replace(BOUND, if_id=5))
    assert routing(tunnel, by_source=True).route(BOUND).reason is Reason.REFUSE_NO_SOURCE
    plain = routing(FlowPath(HERE))
    (command,) = plain.resolved(PathsResolved(((THERE, tunnel),), Origin(mark=7)))
    assert command == do.SetPaths(Origin(mark=7), ((THERE, tunnel),), 1, 0xFF)
    assert plain.gone(Origin(mark=7)) == [do.SetPaths(Origin(mark=7), (), 0, 0xFF)]


def test_a_bound_flow_of_another_namespace_must_have_the_source_that_was_asked_about() -> None:
    made = routing(FlowPath(HERE, translated=NEW), CONTAINER)
    assert made.route(replace(ABROAD, saddr=HERE)).reason is None
    assert made.route(replace(ABROAD, saddr=NEW)).reason is Reason.REFUSE_NO_SOURCE


def test_a_flow_around_the_spd_is_refused_and_no_sa_is_asked_for(trapped: Transcript) -> None:
    around = replace(SOURCES, paths=((THERE, FlowPath(HERE, outside="by macvlan")),))
    trapped.after(around)
    assert trapped.gate.protection.routing.route(FLOW).reason is Reason.REFUSE_OUTSIDE
    assert not [c for c in trapped.after(REFUSED) if isinstance(c, do.Initiate)]


def test_a_refusal_has_the_origin_followed_and_its_end_closes_it(trapped: Transcript) -> None:
    marked = replace(REFUSED, flow=replace(FLOW, mark=7))
    trapped.after(replace(SOURCES, marks=0xFF))
    assert do.FollowOrigin(Origin(mark=7), marked.pid) in trapped.after(marked)
    trapped.after(PathsResolved(((THERE, FlowPath(HERE)),), Origin(mark=7)))
    assert trapped.gate.protection.routing.route(marked.flow).reason is None
    trapped.after(OriginGone(Origin(mark=7)))
    assert trapped.gate.protection.routing.route(marked.flow).reason is Reason.REFUSE_NO_SOURCE


def test_only_the_bits_of_a_mark_count_that_routing_rules_ask_for() -> None:
    made = routing(FlowPath(HERE))
    assert made.route(replace(FLOW, mark=0x100)).reason is None
    assert made.want(replace(FLOW, mark=0x107), 1) == [do.FollowOrigin(Origin(mark=7), 1)]


def test_origins_are_limited() -> None:
    made = routing(FlowPath(HERE))
    for number in range(1, ORIGINS + 1):
        made.resolved(PathsResolved(((THERE, FlowPath(HERE)),), Origin(netns=number)))
    assert len(made.paths) == ORIGINS
    assert made.route(replace(FLOW, netns=ORIGINS)).reason is Reason.REFUSE_NETNS
    assert "others are refused" in made.errors[0].text


def test_the_verdict_of_one_lookup() -> None:
    for state, derived in product((*State, None), (False, True)):
        passed = state is State.PASS and derived
        allowed = Reason.ALLOW_PASSED if passed else Reason.ALLOW_COVERED
        expected = allowed if passed or state is State.LIVE else Reason.REFUSE_UNCOVERED
        found = verdict((FLOW,), lambda _: state, derived=derived, tunneled=False)  # noqa: B023
        assert found is expected, state


@pytest.mark.parametrize(
    ("first", "second", "translated", "covered"),
    [
        (None, State.LIVE, False, True),
        (State.PASS, State.LIVE, False, True),
        (State.LIVE, None, False, True),  # protected before the tunnel device
        (State.DEAD, State.LIVE, False, False),
        (None, State.DEAD, False, False),
        (None, None, False, False),
        (None, State.PASS, False, False),  # a tunnel device drops it
        (State.LIVE, State.LIVE, True, True),
        (State.LIVE, None, True, False),  # masquerading undoes the first lookup
        (State.DEAD, State.LIVE, True, False),  # dropped before it is translated
        (None, State.LIVE, True, True),
    ],
)
def test_the_verdict_of_two_lookups(
    first: State | None, second: State | None, translated: bool, covered: bool
) -> None:
    again = replace(ROUTED, saddr=NEW) if translated else replace(ROUTED, if_id=1)
    states = {ROUTED: first, again: second}
    found = verdict((ROUTED, again), states.get, derived=True, tunneled=not translated)
    assert (found is Reason.ALLOW_COVERED) is covered
