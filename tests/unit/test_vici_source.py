"""Userspace ESP: the daemon's SAs and the routes decide which flows are protected, not XFRM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.coverage import Coverage
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import (
    PORT_MASK,
    TCP,
    UDP,
    Flow,
    FlowPath,
    Network,
    TrafficSelector,
)
from ipsecgate.core.model.ipsec import ChildSa
from ipsecgate.core.model.policy import SaSource, Settings
from ipsecgate.core.model.problem import Problem
from ipsecgate.core.state.userspace_esp import UserspaceEsp
from ipsecgate.core.tables.layout import State, TableId, flow_key
from ipsecgate.core.tables.rule_table import RuleTable
from tests.unit.transcript import (
    HERE,
    LISTED,
    LOCAL,
    NAME,
    NET,
    REFUSED,
    ROUTED,
    SOURCES,
    THERE,
    UP,
    Transcript,
    initiated,
)

TUNNEL = replace(SOURCES, into_tun=((THERE, True),))
REKEYED = replace(LISTED, spi_in=0x12, spi_out=0xC0FFEE02)
VICI = Settings(sa_source=SaSource.VICI)


def connected(*established: ChildSa, userland: bool = True) -> on.IkeConnected:
    return on.IkeConnected((NET,), established, 42, userland)


@pytest.fixture(params=[Settings(), VICI], ids=["found out", "configured"])
def transcript(request: pytest.FixtureRequest) -> Transcript:
    """IKE connected, no SA, no route into a tunnel; XFRM was never dumped."""
    transcript = Transcript(request.param)
    transcript.after(connected(), SOURCES)
    return transcript


def up(transcript: Transcript) -> None:
    transcript.after(REFUSED, TUNNEL, on.ChildUp(LISTED))
    assert transcript.is_open()


# --- opening and closing ---------------------------------------------------------------


def test_a_flow_opens_once_its_sa_is_up_and_its_route_leads_into_the_tunnel(
    transcript: Transcript,
) -> None:
    assert TableId.SPD in transcript.gate.tables, "published without waiting for XFRM"
    assert not transcript.is_open()
    assert initiated(transcript.after(REFUSED)) == [NAME]
    assert not any(isinstance(c, do.Change) for c in transcript.after(TUNNEL)), "no SA yet"
    opened = transcript.after(on.ChildUp(LISTED))
    assert isinstance(opened[0], do.Change)
    assert transcript.is_open()
    assert transcript.gate.negotiations.by_child[NAME].coverage is Coverage.COVERED


def test_an_sa_without_its_route_opens_nothing(transcript: Transcript) -> None:
    transcript.after(REFUSED, on.ChildUp(LISTED))
    assert not transcript.is_open()
    transcript.after(TUNNEL)
    assert transcript.is_open()


@pytest.mark.parametrize(
    "closing",
    [
        (on.ChildDown(LISTED),),
        (on.IkeGone(Problem("connection closed")),),
        (SOURCES,),
        (replace(SOURCES, into_tun=((THERE, False),)),),
        (connected(), connected()),
    ],
    ids=["down", "gone", "no tunnel", "route elsewhere", "not listed"],
)
def test_a_flow_closes_before_anything_else_is_done(
    transcript: Transcript, closing: Sequence[on.Event]
) -> None:
    up(transcript)
    commands = transcript.after(*closing)
    assert not transcript.is_open()
    assert isinstance(commands[0], do.Change | do.SetPaths), "before all else"
    assert transcript.gate.negotiations.by_child[NAME].coverage is Coverage.UNCOVERED
    transcript.after(connected(), TUNNEL, on.ChildUp(REKEYED))
    assert transcript.is_open()


def test_the_flow_stays_open_during_a_rekey(transcript: Transcript) -> None:
    up(transcript)
    for event in (on.ChildUp(REKEYED), on.ChildDown(LISTED), connected(REKEYED)):
        transcript.after(event)
        assert transcript.is_open()
    transcript.after(on.ChildDown(REKEYED))
    assert not transcript.is_open()


def test_of_two_sas_of_one_child_the_last_to_go_closes_the_flow(transcript: Transcript) -> None:
    up(transcript)
    transcript.after(on.ChildUp(REKEYED), on.ChildDown(REKEYED))
    assert transcript.is_open()


# --- lists older than events -------------------------------------------------------------


def test_a_list_older_than_an_event_changes_nothing(transcript: Transcript) -> None:
    up(transcript)
    transcript.after(connected())
    assert transcript.is_open(), "the list was made before the child came up"
    transcript.after(on.ChildDown(LISTED), connected(LISTED))
    assert not transcript.is_open(), "the list was made before the child went down"
    transcript.after(connected(), connected(LISTED))
    assert transcript.is_open(), "a later list may use the SPI again"


def test_a_restarted_controller_opens_for_the_listed_sas() -> None:
    transcript = Transcript(remembered=(NET,))
    assert TableId.SPD not in transcript.gate.tables
    for event in (connected(LISTED), TUNNEL):
        assert TableId.SPD not in transcript.gate.tables, "half is still missing"
        transcript.after(event)
    assert transcript.is_open()


# --- the source of SAs -------------------------------------------------------------------


def chosen(transcript: Transcript) -> str:
    return transcript.gate.protection.sa_source.value


def test_the_automatic_source_follows_the_daemon() -> None:
    transcript = Transcript()
    assert chosen(transcript) == "auto"
    transcript.after(on.KernelSnapshot((), ()), connected(LISTED), TUNNEL)
    assert chosen(transcript) == "vici"
    assert transcript.is_open()
    transcript.after(on.IkeGone(Problem("restarted")), connected(LISTED, userland=False))
    assert chosen(transcript) == "xfrm"
    assert not transcript.is_open(), "the kernel does not have the SA"
    transcript.after(*UP)
    assert transcript.is_open()


@pytest.mark.parametrize("userland", [True, False])
@pytest.mark.parametrize("source", [SaSource.XFRM, SaSource.VICI])
def test_a_configured_source_is_kept_and_a_contradiction_is_logged(
    source: SaSource, userland: bool
) -> None:
    transcript = Transcript(Settings(sa_source=source))
    commands = transcript.after(connected(userland=userland), on.KernelSnapshot((), ()))
    warned = [c for c in commands if isinstance(c, do.Log) and c.level == "warning"]
    assert len(warned) == (userland is not (source is SaSource.VICI))
    assert transcript.gate.protection.sa_source is source


def test_a_kernel_daemon_configured_as_userspace_opens_nothing() -> None:
    """Such a daemon has no TUN device, so no route leads into one."""
    transcript = Transcript(VICI)
    transcript.after(connected(LISTED, userland=False), SOURCES, on.ChildUp(LISTED))
    assert not transcript.is_open()


def test_a_child_without_its_route_is_deleted_and_negotiated_again(transcript: Transcript) -> None:
    transcript.after(REFUSED, on.ChildUp(LISTED), on.NegotiationDone(NAME))
    commands = transcript.after(on.TimerFired(on.Timer("limit", NAME)))
    assert do.Terminate(NAME) in commands
    transcript.after(on.TimerFired(on.Timer("retry", NAME)))
    assert initiated(transcript.after(REFUSED)) == [NAME]


def test_a_child_that_has_its_route_is_not_deleted(transcript: Transcript) -> None:
    transcript.after(
        REFUSED, on.NegotiationDone(NAME), replace(TUNNEL, paths=((THERE, FlowPath(LOCAL)),))
    )
    commands = transcript.after(on.ChildUp(LISTED), on.TimerFired(on.Timer("limit", NAME)))
    assert do.Terminate(NAME) not in commands
    # The route chooses a source that the SA does not protect.
    assert transcript.gate.negotiations.by_child[NAME].coverage is Coverage.BACK_OFF


# --- selectors and routes ----------------------------------------------------------------

V6_HERE, V6_THERE = ip_network("2001:db8:a::/64"), ip_network("2001:db8:b::/64")
HTTP = TrafficSelector(THERE, TCP, (8000, 8003))


def states(
    flows: Sequence[Flow],
    local: Sequence[TrafficSelector],
    remote: Sequence[TrafficSelector],
    routes: Sequence[tuple[Network, bool]] = ((THERE, True), (V6_THERE, True)),
) -> list[bool]:
    source = UserspaceEsp()
    source.routed(tuple(routes))
    source.ike_connected([replace(LISTED, local=tuple(local), remote=tuple(remote))])
    rules = RuleTable(lambda _rules: ())
    for owner, its in source.changed_rules(1):
        rules.assign(owner, its)
    found = [rules.table.classify(flow_key(flow)) for flow in flows]
    return [entry is not None and entry.state is State.LIVE for entry in found]


def to(port: int, address: str = "10.2.0.9", proto: int = TCP, sport: int = 0) -> Flow:
    daddr = ip_address(address)
    saddr = ip_address("10.1.0.1" if daddr.version == 4 else "2001:db8:a::1")
    return Flow(daddr, proto, port, saddr, sport)


def test_port_ranges_are_exact() -> None:
    flows = [to(7999), to(8000), to(8003), to(8004), to(8000, proto=UDP), to(8000, "10.3.0.1")]
    assert states(flows, [TrafficSelector(HERE)], [HTTP]) == [
        False,
        True,
        True,
        False,
        False,
        False,
    ]


def test_wide_port_ranges_are_exact() -> None:
    many = TrafficSelector(THERE, TCP, (1, 65534))
    flows = [to(0), to(1), to(40000), to(65534), to(65535)]
    assert states(flows, [TrafficSelector(HERE)], [many]) == [False, True, True, True, False]


def test_families_do_not_mix() -> None:
    local = [TrafficSelector(HERE), TrafficSelector(V6_HERE)]
    remote = [HTTP, TrafficSelector(V6_THERE)]
    flows = [to(8000), to(22), to(22, "2001:db8:b::9"), to(22, "2001:db8:c::9")]
    assert states(flows, local, remote) == [True, False, True, False]


def test_the_source_must_be_inside_the_local_selector() -> None:
    elsewhere = replace(ROUTED, saddr=LOCAL)
    assert states([ROUTED, elsewhere], [TrafficSelector(HERE)], [TrafficSelector(THERE)]) == [
        True,
        False,
    ]


def test_an_unbound_source_port_is_in_no_range() -> None:
    low = TrafficSelector(HERE, TCP, (0, 1023))
    flows = [to(80), to(80, sport=1), to(80, sport=1023), to(80, sport=1024)]
    assert states(flows, [low], [TrafficSelector(THERE)]) == [False, True, True, False]
    assert all(states(flows, [low, TrafficSelector(HERE)], [TrafficSelector(THERE)]))


@pytest.mark.parametrize(
    "selector",
    [
        TrafficSelector(THERE, TCP, (PORT_MASK, 0)),
        TrafficSelector(THERE, 1, (0x800, 0x8FF)),
    ],
    ids=["OPAQUE", "ICMP types"],
)
def test_a_selector_that_the_hooks_cannot_express_protects_nothing(
    selector: TrafficSelector,
) -> None:
    flows = [to(0), to(0x800, proto=1), to(PORT_MASK)]
    assert not any(states(flows, [TrafficSelector(HERE)], [selector]))


def test_the_longest_route_decides() -> None:
    inner, innermost = ip_network("10.2.7.0/24"), ip_network("10.2.7.7/32")
    routes = [(THERE, True), (inner, False), (innermost, True)]
    flows = [to(80), to(80, "10.2.7.1"), to(80, "10.2.7.7")]
    local, remote = [TrafficSelector(HERE)], [TrafficSelector(THERE)]
    assert states(flows, local, remote, routes) == [True, False, True]
    assert states(flows, local, remote, [(THERE, False), (inner, True)]) == [False, True, True]
