"""One-way CHILD_SAs: packets leave protected, but the kernel has lost the inbound SA or policy.

They are logged and deleted, though not while they are being installed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.one_way import FIRST
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import PORT_MASK, UDP, Selector
from ipsecgate.core.model.ipsec import COMP, ESP, Direction, SaId, SpdEntry, SpdKey
from ipsecgate.core.model.policy import Policy, SaSource, Settings
from ipsecgate.core.model.problem import Problem
from tests.unit.transcript import (
    HERE,
    LISTED,
    LOCAL,
    NAME,
    PEER,
    PINNED,
    SA,
    SOURCES,
    TRAP,
    Transcript,
)
from tests.unit.transcript import connected as connected_to

TIMER = on.Timer("one-way", NAME)
FIRED = on.TimerFired(TIMER)
CHILD = replace(LISTED, unique=3)
DELETED = do.Terminate(NAME, 3)
INBOUND = replace(SA, id=SaId(LOCAL, CHILD.spi_in, ESP), saddr=PEER)


def receiving(entry: SpdEntry, **other: object) -> SpdEntry:
    """Return the inbound policy that belongs to an outbound one; `other` alters its selector."""
    template = replace(entry.templates[0], spi=0, saddr=PEER, daddr=LOCAL)
    back = replace(entry.key.selector.reply, **other)  # type: ignore[arg-type]
    key = replace(entry.key, selector=back, direction=Direction.IN)
    return SpdEntry(key, entry.priority, entry.action, (template,))


IN = receiving(PINNED)
STATES = (SA, INBOUND)
POLICIES = (PINNED, IN)
CONNECTED = connected_to(CHILD)


def established(
    policies: Iterable[SpdEntry] = POLICIES, *, settings: Settings | None = None
) -> Transcript:
    transcript = Transcript(settings)
    transcript.after(on.KernelSnapshot(tuple(policies), STATES), CONNECTED, SOURCES)
    return transcript


def timers(commands: list[do.Command]) -> list[float]:
    started = [c for c in commands if isinstance(c, do.StartTimer) and c.timer == TIMER]
    return [c.seconds for c in started]


def deleted(commands: list[do.Command]) -> list[do.Terminate]:
    return [c for c in commands if isinstance(c, do.Terminate)]


def test_a_whole_child_is_left_alone() -> None:
    whole = established()
    commands = whole.after(CONNECTED, on.KernelSnapshot(POLICIES, STATES, check=True), FIRED)
    assert not timers(commands)
    assert not deleted(commands)


@pytest.mark.parametrize(
    "lost",
    [on.PolicyGone(IN.key), on.SaGone(INBOUND.id)],
    ids=["policy", "state"],
)
def test_a_one_way_child_is_logged_and_deleted(lost: on.XfrmEvent) -> None:
    half = established()
    assert half.after(lost) == [], "the outbound half is intact"
    assert timers(half.after(CONNECTED)) == [FIRST]
    assert not timers(half.after(CONNECTED)), "the timer runs"
    log, command = half.after(FIRED)
    assert command == DELETED
    assert isinstance(log, do.Log)
    assert log.level == "warning"
    assert "peer/net: the kernel has lost its inbound SA" in log.text
    assert half.is_open(), "until IKE deletes it"


def test_a_flush_during_an_installation_leaves_a_one_way_child_that_is_deleted() -> None:
    """Only the outbound policy was installed after the flush. Found by chaos tests."""
    half = established()
    half.after(on.PoliciesFlushed(), on.KernelSnapshot((), STATES), on.PolicySet(PINNED))
    half.after(CONNECTED)
    assert deleted(half.after(FIRED)) == [DELETED]


def test_a_child_is_not_deleted_while_it_is_being_installed() -> None:
    begun = Transcript()
    begun.after(on.KernelSnapshot((TRAP,), (SA,)), CONNECTED, SOURCES)
    assert timers(begun.after(CONNECTED)) == [], "the first list started the timer"
    begun.after(on.SaSet(INBOUND), *(on.PolicySet(entry) for entry in POLICIES))
    assert not deleted(begun.after(FIRED))
    assert not timers(begun.after(CONNECTED))


def test_the_successor_of_a_one_way_child_is_not_deleted() -> None:
    half = established()
    half.after(on.PolicyGone(IN.key), CONNECTED)
    successor = replace(CHILD, unique=4, spi_in=0x12, spi_out=0xC0FFEE02)
    half.after(
        on.SaGone(SA.id),
        on.SaSet(replace(SA, id=replace(SA.id, spi=successor.spi_out))),
        connected_to(successor),
    )
    assert not deleted(half.after(FIRED))


def test_only_the_one_way_child_is_deleted_of_several_with_one_configuration() -> None:
    """A gateway may use one connection for many peers."""
    other = replace(CHILD, unique=9, reqid=2, spi_in=0x22, spi_out=0xC0FFEE22)
    half = established()
    half.after(on.SaSet(replace(SA, id=replace(SA.id, spi=other.spi_out), reqid=2)))
    half.after(connected_to(CHILD, other))
    assert deleted(half.after(FIRED)) == [do.Terminate(NAME, 9)]


def test_a_child_that_stays_one_way_is_given_longer_each_time_and_then_left_alone() -> None:
    half = established()
    half.after(on.PolicyGone(IN.key))
    pauses, commands = [], []
    for _ in range(6):
        pauses += timers(half.after(CONNECTED))
        commands += half.after(FIRED)
    assert pauses == [2, 4, 8, 16]
    assert deleted(commands) == [DELETED] * 3
    assert isinstance(commands[-1], do.Log)
    assert "left alone" in commands[-1].text
    half.after(on.PolicySet(IN), CONNECTED)
    assert timers(half.after(on.PolicyGone(IN.key), CONNECTED)) == [FIRST]
    assert deleted(half.after(FIRED)) == [DELETED]


def test_a_child_that_the_daemon_no_longer_lists_is_not_deleted_again() -> None:
    """The SAs of a silent peer stay in the kernel until it answers the deletion."""
    half = established()
    half.after(on.PolicyGone(IN.key), CONNECTED, connected_to())
    assert not deleted(half.after(FIRED))
    assert not timers(half.after(connected_to()))


def test_no_child_is_deleted_while_the_daemon_is_gone() -> None:
    half = established([PINNED])
    half.after(on.IkeGone(Problem("killed")))
    assert not deleted(half.after(FIRED))


def test_a_one_way_child_that_no_policy_protects_is_left_alone() -> None:
    elsewhere = Policy("elsewhere", (ip_network("10.9.0.0/16"),))
    for settings in (Settings((elsewhere,)), Settings(audit=True)):
        half = established([PINNED], settings=settings)
        assert not timers(half.after(CONNECTED))
        assert not deleted(half.after(FIRED))


def test_kernel_policies_made_by_hand_may_be_one_sided() -> None:
    """With `policies = no` the operator makes the policies, and the daemon only the states."""
    by_hand = established([TRAP])
    assert not deleted(by_hand.after(FIRED))
    by_hand.after(on.SaGone(INBOUND.id), CONNECTED)
    assert deleted(by_hand.after(FIRED)) == [DELETED]


CHOSEN = PINNED.key.selector
PORTS = replace(CHOSEN, proto=UDP, sport=7, sport_mask=PORT_MASK, dport=53, dport_mask=0xFFF0)
TYPE = replace(CHOSEN, proto=1, sport=8, sport_mask=PORT_MASK)
TYPE_0 = replace(CHOSEN, proto=1, sport_mask=PORT_MASK)  # code 0, in one direction only
DEVICE = replace(CHOSEN, ifindex=4)
BACK = {
    PORTS: replace(CHOSEN.reply, proto=UDP, sport=53, sport_mask=0xFFF0, dport=7,
                   dport_mask=PORT_MASK),
    TYPE: replace(CHOSEN.reply, proto=1, sport=8, sport_mask=PORT_MASK),
    TYPE_0: replace(CHOSEN.reply, proto=1, dport_mask=PORT_MASK),
    DEVICE: CHOSEN.reply,
}  # fmt: skip


@pytest.mark.parametrize("selector", BACK, ids=["ports", "ICMP type", "ICMP type 0", "device"])
def test_the_answering_policy_has_the_reversed_selector(selector: Selector) -> None:
    assert selector.reply == BACK[selector]
    entry = replace(PINNED, key=SpdKey(selector))
    assert not deleted(established([entry, receiving(entry)]).after(FIRED))
    assert deleted(established([entry, receiving(entry, proto=99)]).after(FIRED)) == [DELETED]


def test_an_spi_that_two_peers_chose_makes_neither_child_one_way() -> None:
    """An SPI names an SA only together with the destination address."""
    far = ip_address("192.0.2.77")
    other = replace(CHILD, unique=9, reqid=2, spi_in=0x22, remote_host=far)
    away = replace(
        PINNED,
        key=SpdKey(Selector(HERE, ip_network("10.7.0.0/16"))),
        templates=(replace(PINNED.templates[0], reqid=2, daddr=far),),
    )
    states = (
        *STATES,
        replace(SA, id=replace(SA.id, daddr=far), reqid=2),
        replace(INBOUND, id=replace(INBOUND.id, spi=0x22), saddr=far, reqid=2),
    )
    whole = Transcript()
    snapshot = on.KernelSnapshot((*POLICIES, away, receiving(away)), states)
    whole.after(snapshot, connected_to(CHILD, other), SOURCES)
    assert not deleted(whole.after(FIRED))


def test_a_compression_template_does_not_make_a_child_one_way() -> None:
    comp = replace(PINNED.templates[0], proto=COMP, spi=0x77)
    entry = replace(PINNED, templates=(comp, *PINNED.templates))
    assert not deleted(established([entry, receiving(entry)]).after(FIRED))


def test_with_userspace_esp_no_child_is_one_way() -> None:
    userland = established([PINNED], settings=Settings(sa_source=SaSource.VICI))
    assert not deleted(userland.after(CONNECTED, FIRED))
