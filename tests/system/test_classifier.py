"""`Table.classify` in userspace and the hooks classify random flows alike in random tables.

The tables go through `Datapath.publish`, the flows are real system calls. Each policy has an
errno of its own, so the result of a call names the entry that the hook found.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st

from ipsecgate.core.gate.routing import Routing
from ipsecgate.core.model.events import PathsResolved
from ipsecgate.core.model.flow import ANY_V4, ANY_V6, Flow, FlowPath, Network, Origin
from ipsecgate.core.tables.layout import Entry, Reason, Setting, State, TableId, flow_key
from ipsecgate.core.tables.table import Rule, Table, Ternary, compile_table, ternary
from ipsecgate.core.tables.verdict import verdict
from tests.system.oracle.judge import wire_words
from tests.system.oracle.two_namespaces import TwoNamespaces, two_namespaces
from tests.system.oracle.world import Call, Kind

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="missing: root")

SEED = int(os.environ.get("CLASSIFIER_SEED", "1"))
EXAMPLES = 60
# Only entries of these tables return these.
ERRNOS = [code for code in range(errno.ECHRNG, errno.EBFONT) if code in errno.errorcode]
PORT = 40000
# Networks and flows use the same eight addresses on each side, so that they often match.
FIRST = {
    "src": {4: ip_address("10.1.0.8"), 6: ip_address("2001:db8:1::8")},
    "dst": {4: ip_address("10.2.0.8"), 6: ip_address("2001:db8:2::8")},
}
NUMBERS = st.integers(0, 7)
MARKS = (1, 5, 0x105)


@dataclass(frozen=True)
class Case:
    """Two tables, a path for every network and mark, and calls."""

    policy: Table
    spd: Table
    routing: Routing
    calls: list[Call]


@pytest.fixture(scope="module")
def namespaces(cache: Path) -> Iterator[TwoNamespaces]:
    with two_namespaces(cache, "classifier") as place:
        asyncio.run(place.prepare())
        place.set_port(PORT)
        yield place


def networks(side: str, family: int) -> st.SearchStrategy[Network]:
    first = FIRST[side][family]
    width = first.max_prefixlen
    return st.builds(
        lambda number, bits: ip_network(f"{first + number}/{bits}", strict=False),
        NUMBERS,
        st.sampled_from((0, width - 8, width - 3, width - 2, width - 1, width)),
    )


def masked(*values: int, masks: tuple[int, ...]) -> st.SearchStrategy[tuple[int, int]]:
    some = st.tuples(st.sampled_from(values), st.sampled_from(masks))
    return st.just((0, 0)) | some.map(lambda one: (one[0] & one[1], one[1]))


@st.composite
def matches(draw: st.DrawFn, local: bool) -> Ternary:
    """Draw what a rule matches; `local`: also the local end and marks, as only the SPD does."""
    family = draw(st.sampled_from((4, 6)))
    port_masks = (0xFFFF, 0xFFFE, 0x8003)
    nowhere = st.just((0, 0))
    return ternary(
        draw(networks("dst", family)),
        src=draw(st.none() | networks("src", family)) if local else None,
        proto=draw(st.sampled_from((0, 0, 6, 17))),
        sport=draw(masked(5000, 5001, PORT, masks=port_masks) if local else nowhere),
        dport=draw(masked(80, 81, 82, masks=port_masks)),
        mark=draw(masked(1, 5, masks=(1, 0xFF)) if local else nowhere),
        if_id=draw(st.sampled_from((None, 0, 0, 1, 2))) if local else None,
    )


@st.composite
def tables(draw: st.DrawFn, table: TableId) -> Table:
    spd = table is TableId.SPD
    found = draw(st.lists(matches(local=spd), max_size=len(ERRNOS)))
    named = (State.PROTECT, State.DERIVED, State.BYPASS, State.DISCARD)
    states = (State.LIVE, State.DEAD, State.PASS) if spd else named
    return compile_table(
        Rule(match, Entry(draw(st.sampled_from(states)), 0 if spd else ERRNOS[place], place))
        for place, match in enumerate(found)
    )


@st.composite
def calls(draw: st.DrawFn) -> Call:
    family = draw(st.sampled_from((4, 6)))
    kind = draw(st.sampled_from((Kind.TCP, Kind.UDP_CONNECT, Kind.SENDTO)))
    src = draw(st.none() | NUMBERS)
    return Call(
        kind,
        FIRST["dst"][family] + draw(NUMBERS),
        draw(st.sampled_from((80, 81, 82, 83))),
        None if src is None else FIRST["src"][family] + src,
        draw(st.sampled_from((0, 5000, 5001))),
        # send() on UDP connected to a v4-mapped address is checked again, with its source.
        mapped=family == 4 and kind is not Kind.UDP_CONNECT and draw(st.booleans()),
        mark=draw(st.sampled_from((0, *MARKS))),
    )


def paths(family: int) -> st.SearchStrategy[FlowPath]:
    here = st.none() | NUMBERS.map(lambda number: FIRST["src"][family] + number)
    plain = st.builds(FlowPath, here)
    tunnel = st.builds(
        FlowPath, here, st.sampled_from((0, 1, 2)), st.sampled_from((None, None, 0, 1, 5))
    )
    translated = st.builds(FlowPath, here, translated=here)
    outside = st.builds(FlowPath, here, outside=st.just("by another way"))
    return plain | plain | tunnel | translated | outside


@st.composite
def cases(draw: st.DrawFn) -> Case:
    routing = Routing()
    by_source = draw(st.booleans())
    for mark in (0, *draw(st.lists(st.sampled_from(MARKS), unique=True, max_size=2))):
        # Both families need an entry, as from the resolver: ::/0 alone would be taken for IPv4.
        found: dict[Network, FlowPath] = {ANY_V4: FlowPath(None), ANY_V6: FlowPath(None)}
        for family in (4, 6):
            for network in draw(st.lists(networks("dst", family), max_size=4)):
                found[network] = draw(paths(family))
        origin = Origin(mark=mark)
        routing.resolved(PathsResolved(tuple(found.items()), origin, by_source, 0x1FF))
    return Case(
        draw(tables(TableId.POLICY)),
        draw(tables(TableId.SPD)),
        routing,
        draw(st.lists(calls(), min_size=30, max_size=60)),
    )


def expected(case: Case, call: Call) -> str:
    """Return the name of the errno, "" if let through: the hook's verdict() in Python."""
    sport = call.sport or (PORT if call.port_known else 0)
    flow = Flow(call.dst, call.proto, call.dport, call.src, sport, call.mark)
    policy = case.policy.classify(flow_key(flow))
    if policy is None or policy.state is State.BYPASS:
        return ""
    refused = errno.errorcode[policy.error]
    if policy.state is State.DISCARD:
        return refused
    routed = case.routing.route(flow)
    if routed.reason is not None:
        return refused

    def state_of(lookup: Flow) -> State | None:
        winner = case.spd.classify(flow_key(lookup))
        return None if winner is None else winner.state

    tunneled = routed.path is not None and routed.path.is_tunneled
    derived = policy.state is State.DERIVED
    reason = verdict(routed.lookups, state_of, derived=derived, tunneled=tunneled)
    return "" if reason < Reason.REFUSE_UNCOVERED else refused


async def publish(namespaces: TwoNamespaces, case: Case) -> None:
    for origin in namespaces.data.origins:
        namespaces.data.set_paths(origin, ())
    for origin, found in case.routing.paths.items():
        namespaces.data.set_paths(origin, found)
    namespaces.data.set(Setting.PATHS, case.routing.bound_too)
    namespaces.data.set(Setting.MARKS, 0x1FF)
    await namespaces.data.publish(TableId.POLICY, case.policy)
    await namespaces.data.publish(TableId.SPD, case.spd)


def test_hooks_and_userspace_classify_alike(namespaces: TwoNamespaces) -> None:
    seen: dict[str, int] = {"let through": 0, "refused": 0}

    @with_seed(SEED)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def compare(case: Case) -> None:
        asyncio.run(publish(namespaces, case))
        results = namespaces.gated([wire_words(call) for call in case.calls])
        namespaces.capture.forget(len(case.calls))
        names = {errno.errorcode[code] for code in ERRNOS}
        for call, (name, _) in zip(case.calls, results, strict=True):
            found = name if name in names else ""
            assert found == expected(case, call), f"{call}: the hook says {name or 'go'}"
            seen["refused" if found else "let through"] += 1

    print(f"CLASSIFIER_SEED={SEED}")  # noqa: T201
    compare()
    assert min(seen.values()) > sum(seen.values()) / 10, f"one-sided: {seen}"
