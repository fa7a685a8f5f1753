"""No peer can affect the flows of another."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from ipsecgate.core.gate import commands as do
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import Selector, TrafficSelector
from ipsecgate.core.model.ipsec import ESP, ChildName, Mode, SaId, SpdKey
from ipsecgate.core.state.kernel_state import KernelState
from tests.unit.transcript import (
    HERE,
    LISTED,
    LOCAL,
    NAME,
    PINNED,
    REFUSED,
    SA,
    SOURCES,
    TRAP,
    UP,
    Transcript,
    connected,
)

OTHER = ip_address("192.0.2.3")
ELSEWHERE = ip_network("10.3.0.0/16")
# The other peer has chosen the same SPI as the first.
OTHER_SA = replace(SA, id=SaId(OTHER, SA.id.spi, ESP), reqid=2)
OTHER_POLICY = replace(
    TRAP,
    key=SpdKey(Selector(HERE, ELSEWHERE)),
    templates=(replace(TRAP.templates[0], reqid=2, daddr=OTHER, spi=SA.id.spi),),
)
OTHER_LISTED = replace(
    LISTED,
    name=ChildName("other", "net"),
    reqid=2,
    spi_in=0x12,
    remote_host=OTHER,
    remote=(TrafficSelector(ELSEWHERE),),
    unique=2,
)


def test_a_peer_that_chooses_the_spi_of_another_closes_none_of_its_flows() -> None:
    transcript = Transcript()
    transcript.after(on.KernelSnapshot((TRAP,), ()), connected(), SOURCES, REFUSED, *UP)
    transcript.after(on.ChildUp(LISTED))
    assert transcript.is_open()
    for event in (on.SaSet(OTHER_SA), on.PolicySet(OTHER_POLICY), on.ChildUp(OTHER_LISTED)):
        transcript.after(event)
        assert transcript.is_open(), event
    transcript.after(connected(LISTED, OTHER_LISTED))
    assert transcript.is_open()
    transcript.after(on.SaGone(OTHER_SA.id), on.ChildDown(OTHER_LISTED), connected(LISTED))
    assert transcript.is_open()


def test_a_stale_sa_is_not_confirmed_by_another_peers_equal_spi() -> None:
    transcript = Transcript()
    transcript.after(on.KernelSnapshot((TRAP,), (SA,)), connected(OTHER_LISTED), SOURCES)
    assert not transcript.is_open(), "a killed daemon left it, and no peer has it"
    assert transcript.gate.protection.kernel_state.confirmed_sas() == []


def test_an_sa_protects_only_the_flows_of_its_own_policy() -> None:
    """Before the daemon reports it: the wider policy of the other peer names the same SPI."""
    trap = replace(TRAP, key=SpdKey(Selector(HERE, ip_network("10.0.0.0/8"))))
    narrow = replace(PINNED, key=SpdKey(Selector(HERE, ip_network("10.2.9.0/24"))), priority=1)
    wide = replace(OTHER_POLICY, key=SpdKey(Selector(HERE, ip_network("10.2.0.0/16"))), priority=9)
    transcript = Transcript()
    transcript.after(on.KernelSnapshot((trap, narrow), ()), connected(), SOURCES)
    transcript.after(on.SaSet(SA))
    assert not transcript.is_open()
    transcript.after(on.PolicySet(replace(wide, priority=TRAP.priority + 1)))
    assert not transcript.is_open()


def mirrored(*events: on.XfrmEvent) -> KernelState:
    kernel_state = KernelState()
    kernel_state.ike_connected((LISTED, OTHER_LISTED))
    for event in events:
        kernel_state.apply(event)
    return kernel_state


def test_a_listed_sa_is_missing_even_if_another_peer_has_its_spi() -> None:
    kernel_state = mirrored(on.PolicySet(PINNED), on.PolicySet(OTHER_POLICY), on.SaSet(OTHER_SA))
    assert kernel_state.is_missing(LISTED)
    assert not kernel_state.is_missing(OTHER_LISTED)
    assert kernel_state.child_of(OTHER_SA) == OTHER_LISTED.name
    assert kernel_state.child_of(replace(SA, id=SaId(OTHER, 0x77, ESP))) is None


def test_an_outbound_sa_with_an_inbound_spi_of_ours_is_still_listed() -> None:
    """A peer may choose an SPI that we also use for receiving."""
    kernel_state = mirrored(on.SaSet(replace(SA, id=SaId(OTHER, LISTED.spi_in, ESP))))
    assert [sa.id.daddr for sa in kernel_state.outbound_sas()] == [OTHER]


def test_a_peer_cannot_hide_a_one_way_child_by_choosing_our_spi() -> None:
    """The peer has chosen our inbound SPI for its own, and our inbound SA is lost."""
    same = replace(LISTED, spi_out=LISTED.spi_in)
    sa = replace(SA, id=SaId(SA.id.daddr, LISTED.spi_in, ESP))
    kernel_state = KernelState()
    kernel_state.ike_connected((same,))
    kernel_state.apply(on.SaSet(sa))
    assert kernel_state.one_way_children() == {same}
    kernel_state.apply(on.SaSet(replace(sa, id=SaId(LOCAL, same.spi_in, ESP), saddr=sa.id.daddr)))
    assert kernel_state.one_way_children() == set()


def test_of_two_peers_only_the_one_without_kernel_state_is_deleted() -> None:
    """Two road warriors share one configuration."""
    healthy = replace(OTHER_LISTED, name=LISTED.name, unique=8)
    broken = replace(LISTED, unique=7)
    transcript = Transcript()
    transcript.after(
        on.KernelSnapshot((TRAP, OTHER_POLICY), (OTHER_SA,)), connected(), SOURCES, REFUSED,
        on.NegotiationDone(NAME), connected(broken, healthy),
    )  # fmt: skip
    commands = transcript.after(on.TimerFired(on.Timer("limit", NAME)))
    ended = [c for c in commands if isinstance(c, do.Terminate)]
    assert ended == [do.Terminate(NAME, unique=7)]


def test_an_unparsed_child_is_logged_once_and_does_not_affect_the_others() -> None:
    transcript = Transcript()
    partial = replace(connected(LISTED), unread=("peer/odd: traffic selector 'x'",))
    commands = transcript.after(on.KernelSnapshot((TRAP,), (SA,)), partial, SOURCES)
    assert transcript.is_open()
    assert [c.text for c in commands if isinstance(c, do.Log) and "peer/odd" in c.text]
    again = transcript.after(partial)
    assert not [c for c in again if isinstance(c, do.Log)], "commands once"
    commands = transcript.after(on.IkeUnparsed("child-updown: no value 'name'"))
    assert do.AskIke() in commands
    assert transcript.is_open()


@pytest.mark.parametrize("mode", [Mode.TUNNEL, Mode.TRANSPORT])
def test_a_template_names_an_sa_of_its_own_peer_only(mode: Mode) -> None:
    template: Any = replace(TRAP.templates[0], mode=mode)
    assert template.accepts(SA.id)
    assert not template.accepts(OTHER_SA.id)
    assert replace(template, daddr=None).accepts(OTHER_SA.id)
    assert not replace(template, spi=1).accepts(SA.id)
