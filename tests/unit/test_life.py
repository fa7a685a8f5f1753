"""The life of an SA as transcripts: cases that tests on real hosts have found."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from ipsecgate.core.gate import commands as do
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import PORT_MASK, UDP, Selector, TrafficSelector
from ipsecgate.core.model.ipsec import ChildName, SpdKey
from ipsecgate.core.state.spd import negotiated_regions
from ipsecgate.core.tables.layout import flow_key
from tests.unit.transcript import (
    HERE,
    LISTED,
    NAME,
    NET,
    PINNED,
    REFUSED,
    ROUTED,
    SA,
    THERE,
    TRAP,
    UP,
    Transcript,
    connected,
    initiated,
)

NARROW = ip_network("10.2.0.0/24")
OUTSIDE = replace(ROUTED, daddr=ip_address("10.2.1.9"))
# The peer narrowed the selectors; the SA still has the reqid of the trap.
NARROWED = replace(PINNED, key=SpdKey(Selector(HERE, NARROW)), priority=TRAP.priority - 1000)
AGREED = replace(LISTED, remote=(TrafficSelector(NARROW),))


# --- negotiated selectors ---------------------------------------------------------------


def test_nothing_outside_the_negotiated_selectors_is_ever_open(trapped: Transcript) -> None:
    """The kernel would send it by the trap and the SA of its reqid, and the peer would drop it."""
    for event in (on.SaSet(SA), on.PolicySet(NARROWED), on.ChildUp(AGREED), connected(AGREED)):
        trapped.after(event)
        assert not trapped.is_open(OUTSIDE)
    assert trapped.is_open(ROUTED)


def test_the_kernel_policy_that_names_the_sa_opens_before_the_daemon_reports_it(
    trapped: Transcript,
) -> None:
    assert not trapped.is_open(ROUTED)
    trapped.after(on.SaSet(SA))
    assert not trapped.is_open(ROUTED)
    trapped.after(on.PolicySet(NARROWED))
    assert trapped.is_open(ROUTED)


def test_an_sa_that_no_policy_names_waits_for_the_daemon(trapped: Transcript) -> None:
    """One policy for several SAs, as with one SA per processor, names none of them."""
    trapped.after(on.SaSet(SA))
    assert not trapped.is_open(ROUTED)
    trapped.after(on.ChildUp(LISTED))
    assert trapped.is_open(ROUTED)
    assert trapped.is_open(OUTSIDE)


def test_port_ranges_that_the_kernel_widens_are_exact_once_the_daemon_reports_them(
    trapped: Transcript,
) -> None:
    rounded = Selector(HERE, THERE, UDP, dport=5296, dport_mask=0xFFF0)
    trapped.after(on.SaSet(SA), on.PolicySet(replace(NARROWED, key=SpdKey(rounded))))
    selector = TrafficSelector(THERE, UDP, (5300, 5307))
    trapped.after(on.ChildUp(replace(LISTED, remote=(selector,))))
    found = {p for p in range(5290, 5320) if trapped.is_open(replace(ROUTED, proto=UDP, dport=p))}
    assert found == set(range(5300, 5308))


def test_a_list_made_before_a_child_came_up_does_not_remove_it(trapped: Transcript) -> None:
    trapped.after(on.SaSet(SA), on.ChildUp(LISTED), connected())
    assert trapped.is_open(ROUTED)
    trapped.after(on.SaGone(SA.id), connected(), on.SaSet(SA))
    assert not trapped.is_open(ROUTED), "the daemon has not reported this one"


@pytest.mark.parametrize(
    ("local", "remote", "expected"),
    [
        (TrafficSelector(HERE), TrafficSelector(THERE), {0, 80, PORT_MASK}),
        (TrafficSelector(HERE, UDP), TrafficSelector(THERE, 0, (80, 80)), set()),
        (TrafficSelector(HERE), TrafficSelector(THERE, 0, (80, 80)), {80}),
        (TrafficSelector(HERE), TrafficSelector(THERE, 0, (PORT_MASK, 0)), set()),
        (TrafficSelector(HERE), TrafficSelector(ip_network("2001:db8::/32")), set()),
        # Too many masks for the hooks' table: left to the kernel's own, wider selector.
        (TrafficSelector(HERE), TrafficSelector(THERE, 0, (1, PORT_MASK)), {0, 80, PORT_MASK}),
    ],
)
def test_the_negotiated_flows_are_in_both_traffic_selectors(
    local: TrafficSelector, remote: TrafficSelector, expected: set[int]
) -> None:
    parts = negotiated_regions((local,), (remote,))
    ports = (0, 80, PORT_MASK)
    keys = {port: flow_key(replace(ROUTED, dport=port)) for port in ports}
    assert {port for port, key in keys.items() if any(p.matches(key) for p in parts)} == expected


# --- a narrower child --------------------------------------------------------------------

HOST = ip_network("10.2.0.9/32")
NARROWER = replace(NET, name=ChildName("peer", "host"), remote=(TrafficSelector(HOST),))


def test_the_narrower_child_is_negotiated_when_its_trap_wins(trapped: Transcript) -> None:
    trapped.after(REFUSED, *UP)
    trap = replace(
        TRAP,
        key=SpdKey(Selector(HERE, HOST)),
        priority=TRAP.priority - 2000,
        templates=(replace(TRAP.templates[0], reqid=2),),
    )
    trapped.after(on.PolicySet(trap))
    assert not trapped.is_open(ROUTED)
    both = on.IkeConnected((NET, NARROWER), (LISTED,), pid=42)
    trapped.after(both)
    assert initiated(trapped.after(REFUSED)) == [NARROWER.name]


def test_a_healthy_child_is_neither_negotiated_nor_deleted_when_another_policy_wins(
    trapped: Transcript,
) -> None:
    """Its flow is refused because another policy won, not because the child is missing."""
    trapped.after(REFUSED, *UP, on.ChildUp(LISTED))
    bypass = replace(PINNED, key=SpdKey(Selector(HERE, HOST)), priority=1, templates=())
    trapped.after(on.PolicySet(bypass))
    commands = trapped.after(REFUSED, on.NegotiationDone(NAME), connected(LISTED))
    commands += trapped.after(on.TimerFired(on.Timer("limit", NAME)))
    assert initiated(commands) == []
    assert do.Terminate(NAME) not in commands
    assert trapped.is_open(replace(ROUTED, daddr=ip_address("10.2.0.8")))


def test_a_new_trap_makes_the_gate_ask_for_its_child(trapped: Transcript) -> None:
    narrower = replace(TRAP, key=SpdKey(Selector(HERE, HOST)), priority=TRAP.priority - 2000)
    assert do.AskIke() in trapped.after(on.PolicySet(narrower))


# --- kernel state that was flushed or deleted ----------------------------------------------


def test_a_larval_state_is_not_the_sa_that_the_daemon_lists(trapped: Transcript) -> None:
    """After a flush the next packet creates one with the policy's SPI. Found by chaos tests."""
    trapped.after(REFUSED, *UP, on.ChildUp(LISTED))
    trapped.after(on.KernelSnapshot((PINNED,), (replace(SA, larval=True),)), connected(LISTED))
    assert not trapped.is_open(ROUTED)
    assert initiated(trapped.after(REFUSED)) == [NAME]
    trapped.after(on.NegotiationDone(NAME))
    assert do.Terminate(NAME) in trapped.after(on.TimerFired(on.Timer("limit", NAME)))
    assert trapped.gate.protection.kernel_state.replace(on.KernelSnapshot((PINNED,), ())) == 0, (
        "no drift"
    )


def test_a_child_whose_state_is_lost_is_deleted_although_its_twin_is_intact(
    trapped: Transcript,
) -> None:
    """Both ends initiated at once, and one state was deleted by hand. Found by chaos tests."""
    twin = replace(LISTED, spi_in=0x12, spi_out=0xC0FFEE02)
    other = replace(SA, id=replace(SA.id, spi=twin.spi_out))
    trapped.after(REFUSED, *UP, on.ChildUp(LISTED), on.SaSet(other), on.ChildUp(twin))
    assert trapped.is_open(ROUTED)
    trapped.after(on.SaGone(SA.id), connected(LISTED, twin))
    assert not trapped.is_open(ROUTED)
    assert initiated(trapped.after(REFUSED)) == [NAME]
    trapped.after(on.NegotiationDone(NAME))
    assert do.Terminate(NAME) in trapped.after(on.TimerFired(on.Timer("limit", NAME)))


def test_a_rekeyed_childs_predecessor_does_not_make_it_stale(trapped: Transcript) -> None:
    """The kernel has the successor, and another policy won."""
    new = replace(LISTED, spi_in=0x12, spi_out=0xC0FFEE02)
    trapped.after(on.SaSet(SA), on.SaSet(replace(SA, id=replace(SA.id, spi=new.spi_out))))
    pinned = replace(PINNED, templates=(replace(TRAP.templates[0], spi=new.spi_out),))
    trapped.after(REFUSED, on.PolicySet(pinned), on.ChildUp(LISTED), on.ChildUp(new))
    assert trapped.is_open(ROUTED)
    assert not trapped.gate.protection.stale(NAME, ROUTED)
    trapped.after(on.PolicySet(TRAP), on.SaGone(replace(SA.id, spi=new.spi_out)))
    assert not trapped.gate.protection.stale(NAME, ROUTED), "the trap accepts any SA of its reqid"
