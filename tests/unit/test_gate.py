"""The gate opens a flow while a live SA protects it, and closes it at once when none does."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network
from itertools import permutations

import pytest

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.coverage import Coverage
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import FlowPath, Selector
from ipsecgate.core.model.ipsec import ESP, Action, SaId, SpdKey
from ipsecgate.core.model.policy import Policy, Settings
from ipsecgate.core.model.problem import Problem
from ipsecgate.core.tables.layout import TableId
from tests.unit.transcript import (
    HERE,
    LISTED,
    LOCAL,
    NAME,
    PEER,
    PINNED,
    REFUSED,
    ROUTED,
    SA,
    SOURCES,
    THERE,
    TRAP,
    UP,
    Transcript,
    connected,
    initiated,
)


def test_a_flow_opens_once_the_kernel_has_its_sa_and_the_policy_that_names_it(
    trapped: Transcript,
) -> None:
    assert not trapped.is_open()
    assert initiated(trapped.after(REFUSED)) == [NAME]
    assert trapped.gate.negotiations.by_child[NAME].coverage is Coverage.NEGOTIATING

    assert not trapped.after(on.SaSet(SA)), "the trap does not show the negotiated selectors"
    opened = trapped.after(on.PolicySet(PINNED))
    assert isinstance(opened[0], do.Change), "the first command opens, in one write"
    assert trapped.is_open()
    assert trapped.gate.negotiations.by_child[NAME].coverage is Coverage.COVERED


def test_notifications_that_arrive_together_make_one_change(trapped: Transcript) -> None:
    trapped.after(REFUSED)
    inbound = replace(SA, id=SaId(LOCAL, 0x11, ESP), saddr=PEER)
    commands = trapped.after_together(on.SaSet(inbound), *UP)
    assert [type(c) for c in commands].count(do.Change) == 1
    assert trapped.is_open()
    commands = trapped.after_together(on.SaGone(SA.id), REFUSED, on.SaSet(SA))
    assert trapped.is_open()


def test_without_a_trap_the_sa_alone_opens_nothing() -> None:
    transcript = Transcript()
    transcript.after(on.KernelSnapshot((), ()), connected(), SOURCES, REFUSED)
    transcript.after(on.SaSet(SA))
    assert not transcript.is_open()
    transcript.after(on.PolicySet(PINNED))
    assert transcript.is_open()


@pytest.mark.parametrize(
    "closing",
    [
        on.SaGone(SA.id),
        on.SasFlushed(),
        on.PolicyGone(TRAP.key),
        on.PoliciesFlushed(),
        on.PolicySet(replace(TRAP, action=Action.DISCARD, templates=())),
        on.PolicySet(replace(TRAP, templates=(replace(TRAP.templates[0], reqid=9),))),
        on.KernelSnapshot((TRAP,), ()),
        on.IkeGone(Problem("connection closed")),
    ],
    ids=lambda event: type(event).__name__,
)
def test_a_flow_closes_before_anything_else_is_done(trapped: Transcript, closing: on.Event) -> None:
    trapped.after(REFUSED, *UP)
    assert trapped.is_open()
    first = trapped.after(closing)[0]
    assert isinstance(first, do.Change | do.Publish), "the first command closes"
    assert not trapped.is_open()
    assert trapped.gate.negotiations.by_child[NAME].coverage is Coverage.UNCOVERED


def test_a_kernel_policy_of_higher_priority_closes_the_flow(trapped: Transcript) -> None:
    trapped.after(REFUSED, *UP)
    bypass = replace(TRAP, key=SpdKey(Selector(HERE, ip_network("10.2.0.0/24"))), priority=1,
                     action=Action.BYPASS, templates=())  # fmt: skip
    trapped.after(on.PolicySet(bypass))
    assert not trapped.is_open(), "the kernel would now send it in clear"
    trapped.after(on.PolicyGone(bypass.key))
    assert trapped.is_open()


def test_the_flow_stays_open_during_a_rekey(trapped: Transcript) -> None:
    trapped.after(REFUSED, *UP)
    new = replace(SA, id=SaId(PEER, 0xC0FFEE02, ESP))
    named = replace(TRAP, templates=(replace(TRAP.templates[0], spi=new.id.spi),))
    for event in (on.SaSet(new), on.PolicySet(named), on.SaGone(SA.id)):
        trapped.after(event)
        assert trapped.is_open()


def test_an_sa_that_the_daemon_does_not_list_opens_nothing() -> None:
    transcript = Transcript()
    transcript.after(on.KernelSnapshot((TRAP,), (SA,)), connected(), SOURCES)
    assert not transcript.is_open(), "a killed daemon left the SA"
    transcript.after(connected(LISTED))
    assert transcript.is_open()


def test_a_restarted_controller_publishes_only_after_kernel_daemon_and_routing_have_answered() -> (
    None
):
    """With a part of it, it would refuse flows that the previous table rightly opens."""
    answers: tuple[on.Event, ...] = (
        on.KernelSnapshot((TRAP,), (SA,)),
        connected(LISTED),
        SOURCES,
    )
    for events in permutations(answers):
        transcript = Transcript(Settings(policies=(Policy("net", (THERE,)),)))
        for event in events[:-1]:
            commands = transcript.after(event)
            assert not any(isinstance(c, do.Publish) and c.table is TableId.SPD for c in commands)
        transcript.after(events[-1])
        assert transcript.is_open()


def test_a_flow_is_covered_only_once_its_route_chooses_a_protected_source() -> None:
    """Tunnel mode: only strongSwan's route gives an unbound socket a source inside the policy."""
    transcript = Transcript()
    outer = on.PathsResolved(((THERE, FlowPath(LOCAL)),))
    transcript.after(on.KernelSnapshot((), ()), connected(), outer)
    assert initiated(transcript.after(REFUSED)) == [NAME]
    transcript.after(*UP)
    assert transcript.gate.negotiations.by_child[NAME].coverage is Coverage.NEGOTIATING
    transcript.after(SOURCES)
    assert transcript.gate.negotiations.by_child[NAME].coverage is Coverage.COVERED


def test_the_daemon_is_exempt_while_it_is_connected(trapped: Transcript) -> None:
    transcript = Transcript()
    assert do.ExemptIke(42) in transcript.after(connected())
    assert do.ExemptIke(0) in transcript.after(on.IkeGone(Problem("connection closed")))


def test_a_thousand_refusals_do_not_delay_a_closing(trapped: Transcript) -> None:
    trapped.after(REFUSED, *UP)
    commands = trapped.after_together(*[REFUSED] * 1000, on.SaGone(SA.id))
    assert isinstance(commands[0], do.Change)
    assert not trapped.is_open()


def test_a_periodic_check_repairs_and_counts_what_has_drifted(trapped: Transcript) -> None:
    trapped.after(*UP)
    assert trapped.is_open()
    same = on.KernelSnapshot((PINNED,), (SA,), check=True)
    assert [c for c in trapped.after(same) if isinstance(c, do.Log)] == []
    assert trapped.gate.protection.drift == 0
    commands = trapped.after(on.KernelSnapshot((PINNED,), (), check=True))
    assert commands[0] == do.Log("error", "1 policies or SAs differed from the kernel's: repaired")
    assert trapped.gate.protection.drift == 1
    assert not trapped.is_open()


def test_a_periodic_check_verifies_every_hook_table(trapped: Transcript) -> None:
    tables = trapped.gate.tables
    assert tables.keys() == set(TableId)
    assert trapped.after(on.CheckDue()) == [do.Verify(*item) for item in tables.items()]


def test_with_destroy_set_a_lost_sa_cuts_off_the_sockets_that_it_protected() -> None:
    transcript = Transcript(Settings(destroy=True))
    transcript.after(on.KernelSnapshot((TRAP,), ()), connected(), SOURCES, *UP)
    assert transcript.is_open()
    assert not transcript.gate.is_cut_off(ROUTED)
    renewed = replace(SA, id=replace(SA.id, spi=0xC0FFEE02))
    pinned = replace(TRAP, templates=(replace(TRAP.templates[0], spi=0xC0FFEE02),))
    rekeyed = transcript.after(on.SaSet(renewed), on.PolicySet(pinned), on.SaGone(SA.id))
    assert do.CutOff() not in rekeyed, "make before break"
    assert do.CutOff() in transcript.after(on.PolicySet(TRAP), on.SaGone(renewed.id))
    assert transcript.gate.is_cut_off(ROUTED)
    assert not transcript.gate.is_cut_off(replace(ROUTED, daddr=ip_address("192.0.2.77")))


def test_without_destroy_a_lost_sa_cuts_off_no_socket(trapped: Transcript) -> None:
    trapped.after(*UP)
    assert do.CutOff() not in trapped.after(on.PolicySet(TRAP), on.SaGone(SA.id))
