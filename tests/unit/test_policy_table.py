"""Which flows must be protected: configured, derived from IKE, remembered, and too many."""

from __future__ import annotations

from dataclasses import replace
from errno import EPERM
from ipaddress import ip_address, ip_network

import pytest

from ipsecgate.core.gate import commands as do
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import TCP, UDP, Flow, Selector, TrafficSelector
from ipsecgate.core.model.ipsec import Action, ChildName, SpdKey
from ipsecgate.core.model.policy import Policy, Settings
from ipsecgate.core.tables import rule_table
from ipsecgate.core.tables.layout import Entry, State, TableId
from tests.unit.transcript import (
    FLOW,
    HERE,
    LISTED,
    NAME,
    NET,
    REFUSED,
    ROUTED,
    SA,
    SOURCES,
    THERE,
    TRAP,
    Transcript,
    connected,
    initiated,
)


def test_remembered_connections_are_protected_without_the_daemon() -> None:
    first = Transcript()
    (kept,) = [c for c in first.after(connected()) if isinstance(c, do.Remember)]
    later = Transcript(remembered=kept.children)
    assert later.errno == EPERM
    later.after(on.IkeConnected((), (), pid=7))
    assert later.errno == EPERM, "a daemon that lost its connections opens nothing"


def test_configured_policies_replace_the_derived_ones() -> None:
    policy = Policy("db", (ip_network("10.2.0.0/24"),), proto=TCP, ports=(5432, 5432), child="net")
    transcript = Transcript(Settings(policies=(policy,)))
    transcript.after(on.KernelSnapshot((TRAP,), ()), connected())
    assert transcript.entry(TableId.POLICY, ROUTED) is None
    database = replace(FLOW, dport=5432)
    assert transcript.entry(TableId.POLICY, replace(ROUTED, dport=5432)) == Entry(
        State.PROTECT, EPERM
    )
    assert initiated(transcript.after(replace(REFUSED, flow=database))) == [NAME]


def test_exceptions_come_before_the_derived_policies() -> None:
    """Alone they say nothing of what must be protected, so they take nothing out of protection."""
    resolver = Policy("resolver", (ip_network("10.2.0.53/32"),), Action.BYPASS, UDP, (53, 53))
    transcript = Transcript(Settings(policies=(resolver,)))
    query = replace(ROUTED, daddr=ip_address("10.2.0.53"), proto=UDP, dport=53)
    elsewhere = replace(ROUTED, daddr=ip_address("198.51.100.1"))
    for daemon in (None, connected()):
        if daemon is not None:
            transcript.after(on.KernelSnapshot((TRAP,), ()), daemon)
        assert transcript.entry(TableId.POLICY, query).state is State.BYPASS  # type: ignore[union-attr]
        assert transcript.errno == EPERM
    assert transcript.entry(TableId.POLICY, elsewhere) is None


# The two children of an OVN tunnel: to a peer's port, and from one's own.
OUT = replace(
    NET,
    name=ChildName("ovn", "out"),
    local=(TrafficSelector(HERE, UDP),),
    remote=(TrafficSelector(THERE, UDP, (6081, 6081)),),
)
IN = replace(
    NET,
    name=ChildName("ovn", "in"),
    local=(TrafficSelector(HERE, UDP, (6081, 6081)),),
    remote=(TrafficSelector(THERE, UDP),),
)


@pytest.mark.parametrize(
    ("sport", "dport", "protected"),
    [
        (0, 6081, True), (40000, 6081, True), (6081, 53, True), (6081, 6081, True),
        (0, 53, False), (40000, 53, False),
    ],
)  # fmt: skip
def test_derived_policies_keep_the_ports_of_both_sides(
    sport: int, dport: int, protected: bool
) -> None:
    transcript = Transcript()
    transcript.after(on.IkeConnected((OUT, IN), (), pid=42))
    flow = replace(ROUTED, proto=UDP, sport=sport, dport=dport)
    entry = transcript.entry(TableId.POLICY, flow)
    assert (entry is not None and entry.state is State.DERIVED) is protected
    assert transcript.entry(TableId.POLICY, replace(flow, proto=TCP)) is None


@pytest.mark.parametrize(("action", "named"), [(Action.PROTECT, True), (Action.BYPASS, False)])
def test_an_unbound_socket_may_get_a_local_port_that_the_kernel_chooses_from(
    action: Action, named: bool
) -> None:
    protect = Policy("rest", (ip_network("192.0.2.0/24"),))
    policy = Policy("p", (THERE,), action, UDP, local_ports=(40000, 40001))
    transcript = Transcript(Settings(policies=(policy, protect)))
    unbound = replace(ROUTED, proto=UDP)
    assert (transcript.entry(TableId.POLICY, unbound) is not None) is named
    for sport, inside in ((40000, True), (40001, True), (40002, False)):
        entry = transcript.entry(TableId.POLICY, replace(unbound, sport=sport))
        assert (entry is not None) is inside


def test_local_ports_that_were_ever_loaded_stay() -> None:
    transcript = Transcript()
    transcript.after(on.IkeConnected((IN,), (), pid=42))
    moved = replace(IN, local=(TrafficSelector(HERE, UDP, (4789, 4789)),))
    transcript.after(on.IkeConnected((moved,), (), pid=42))
    for sport, named in ((6081, True), (4789, True), (53, False)):
        entry = transcript.entry(TableId.POLICY, replace(ROUTED, proto=UDP, sport=sport))
        assert (entry is not None) is named


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks that hold twelve masks of policies' own, and 200 entries."""
    monkeypatch.setattr(rule_table, "MASK_LIMIT", rule_table.COARSE_MASKS + 12)
    monkeypatch.setattr(rule_table, "ENTRY_LIMIT", rule_table.COARSE_ENTRIES + 200)


def test_kernel_policies_that_do_not_fit_the_hook_table_refuse_their_flows(small: None) -> None:
    transcript = Transcript()
    many = tuple(
        replace(TRAP, key=SpdKey(Selector(HERE, ip_network(f"10.2.0.0/{n}"))), priority=99 - n)
        for n in range(15, 33)
    ) + tuple(
        replace(TRAP, key=SpdKey(Selector(ip_network(f"10.1.0.0/{n}"), THERE)), priority=99 - n)
        for n in range(17, 33)
    )
    transcript.after(on.KernelSnapshot(many, (SA,)), connected(LISTED), SOURCES)
    ends = [(near, far) for near in range(16) for far in range(16)]
    flows = [replace(ROUTED, saddr=HERE[1 << near], daddr=THERE[1 << far]) for near, far in ends]
    entries = [transcript.entry(TableId.SPD, flow) for flow in flows]
    closed = [entry is None or entry.state is not State.LIVE for entry in entries]
    assert any(closed)
    assert any("SPD table" in error.text for error in transcript.gate.errors)
    transcript.after(on.KernelSnapshot((TRAP,), (SA,)))
    assert transcript.is_open()
    assert transcript.gate.errors == []


def test_a_derived_policy_never_becomes_narrower() -> None:
    transcript = Transcript()
    transcript.after(connected())
    narrower = replace(NET, remote=(TrafficSelector(ip_network("10.2.3.0/24")),))
    transcript.after(on.IkeConnected((narrower,), (), pid=42))
    assert transcript.errno == EPERM


def test_a_connection_whose_peer_is_unknown_is_reported_as_an_error(trapped: Transcript) -> None:
    trapped.after(
        on.IkeConnected((NET, replace(NET, name=ChildName("peer", "any"), remote=())), (), pid=42)
    )
    assert any("child peer/any" in error.text for error in trapped.gate.errors)
    trapped.after(connected())
    assert trapped.gate.errors == []


def test_policies_that_do_not_fit_protect_their_whole_networks(small: None) -> None:
    wide = tuple(
        Policy(f"p{n}", (ip_network(f"10.0.0.0/{n}"),), proto=TCP, ports=(1, 65534))
        for n in (24, 16, 8)
    )
    transcript = Transcript(Settings(policies=wide))
    assert any("POLICY table" in error.text for error in transcript.gate.errors)
    inside = Flow(ip_address("10.9.9.9"), 17, 53, ip_address("10.1.0.1"))
    entry = transcript.entry(TableId.POLICY, inside)
    assert entry is not None
    assert entry.state is State.PROTECT
    assert transcript.entry(TableId.POLICY, replace(inside, daddr=ip_address("8.8.8.8"))) is None


def test_policies_that_do_not_fit_even_as_networks_protect_everything(small: None) -> None:
    networks = tuple(ip_network((number << 8, 24)) for number in range(1 << 16, (1 << 16) + 300))
    one = Policy("all", networks, proto=TCP, ports=(1, 7))
    bypass = Policy("first", (ip_network("192.0.2.0/24"),), Action.BYPASS)
    transcript = Transcript(Settings(policies=(bypass, one)))
    entry = transcript.entry(TableId.POLICY, replace(FLOW, daddr=ip_address("198.51.100.1")))
    assert entry is not None
    assert (entry.state, entry.id) == (State.PROTECT, 1)
    assert "because of all" in transcript.gate.errors[0].text
