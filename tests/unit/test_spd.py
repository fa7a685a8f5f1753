"""The SPD joined with the SAD: which flows count as protected."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from ipsecgate.core.model.flow import TCP, UDP, Flow, Selector
from ipsecgate.core.model.ipsec import (
    COMP,
    ESP,
    Action,
    Mark,
    Mode,
    Sa,
    SaId,
    SpdEntry,
    SpdKey,
    Template,
)
from ipsecgate.core.tables.layout import State, flow_key
from ipsecgate.core.tables.table import compile_table
from tests.reference_rules import rules_from_scratch

LOCAL, PEER = ip_address("192.0.2.1"), ip_address("192.0.2.2")
TUNNEL = Template(ESP, Mode.TUNNEL, reqid=1, saddr=LOCAL, daddr=PEER)
TRANSPORT = Template(ESP, Mode.TRANSPORT, reqid=1)


def selector(src: str = "10.1.0.0/16", dst: str = "10.2.0.0/16", **more: Any) -> Selector:
    return Selector(ip_network(src), ip_network(dst), **more)


def policy(sel: Selector, *templates: Template, priority: int = 100, **more: Any) -> SpdEntry:
    key = SpdKey(sel, more.pop("mark", Mark()), more.pop("if_id", 0))
    return SpdEntry(key, priority, more.pop("action", Action.PROTECT), templates, **more)


SA = Sa(SaId(PEER, 0x1000, ESP), LOCAL, reqid=1, mode=Mode.TUNNEL)
TRANSPORT_SA = replace(SA, mode=Mode.TRANSPORT)
FLOW = Flow(ip_address("10.2.0.9"), TCP, 80, ip_address("10.1.0.1"), 40000)
NET = policy(selector(), TUNNEL)


def live(policies: list[SpdEntry], sas: list[Sa], flow: Flow = FLOW) -> bool:
    entry = compile_table(rules_from_scratch(policies, sas)).classify(flow_key(flow))
    return entry is not None and entry.state is State.LIVE


def test_a_policy_with_its_sa_protects() -> None:
    assert live([NET], [SA])


@pytest.mark.parametrize(
    "sa",
    [
        replace(SA, reqid=2),
        replace(SA, mode=Mode.TRANSPORT),
        replace(SA, saddr=ip_address("192.0.2.3")),
        replace(SA, id=SaId(ip_address("192.0.2.3"), 0x1000, ESP)),
        replace(SA, id=SaId(PEER, 0x1000, 51)),
        replace(SA, larval=True),
        replace(SA, if_id=7),
        replace(SA, cpu=0),
        replace(SA, mark=Mark(5, 0xFF)),
        replace(SA, selector=selector(dst="10.2.1.0/24")),
    ],
)
def test_a_state_that_does_not_match_the_template_protects_nothing(sa: Sa) -> None:
    assert not live([NET], [sa])
    assert live([NET], [sa, SA])


def test_neither_policy_nor_sa_protects_alone() -> None:
    assert not live([NET], [])
    assert not live([], [SA])


def test_a_template_with_an_spi_needs_that_sa() -> None:
    pinned = policy(selector(), replace(TUNNEL, spi=0x1000))
    assert live([pinned], [SA])
    assert not live([policy(selector(), replace(TUNNEL, spi=0x2000))], [SA])


def test_the_selector_of_a_state_narrows_what_it_protects() -> None:
    narrowed = replace(SA, selector=selector(dst="10.2.0.0/24"))
    assert live([NET], [narrowed])
    assert not live([NET], [narrowed], replace(FLOW, daddr=ip_address("10.2.1.9")))


def test_transport_mode_protects_only_the_endpoints_of_the_state() -> None:
    anywhere = policy(selector("0.0.0.0/0", "0.0.0.0/0"), TRANSPORT)
    flow = Flow(PEER, TCP, 80, LOCAL)
    assert live([anywhere], [TRANSPORT_SA], flow)
    assert not live([anywhere], [TRANSPORT_SA], replace(flow, daddr=ip_address("192.0.2.3")))
    assert not live([anywhere], [TRANSPORT_SA], replace(flow, saddr=ip_address("192.0.2.9")))


def test_every_required_template_needs_its_state() -> None:
    nested = policy(selector(), TUNNEL, replace(TUNNEL, reqid=2))
    second = replace(SA, id=SaId(PEER, 0x2000, ESP), reqid=2)
    assert not live([nested], [SA])
    assert not live([nested], [second])
    assert live([nested], [SA, second])
    optional = policy(selector(), replace(TUNNEL, reqid=3, optional=True), TUNNEL)
    assert live([optional], [SA])
    assert not live([policy(selector(), replace(TUNNEL, optional=True))], [SA])


@pytest.mark.parametrize("action", [Action.DISCARD, Action.BYPASS])
def test_the_policy_of_the_best_priority_decides(action: Action) -> None:
    narrow = selector(dst="10.2.0.0/24")
    assert not live([NET, policy(narrow, priority=50, action=action)], [SA])
    assert live([NET, policy(narrow, priority=150, action=action)], [SA])


def test_policies_of_equal_priority_must_agree() -> None:
    other = policy(selector(dst="10.2.0.0/24"), replace(TUNNEL, reqid=2))
    both = replace(SA, id=SaId(PEER, 0x2000, ESP), reqid=2)
    outside = replace(FLOW, daddr=ip_address("10.2.7.9"))
    for order in ([NET, other], [other, NET]):
        assert not live(order, [SA])
        assert live(order, [SA], outside)
        assert live(order, [SA, both])


def test_policies_that_differ_only_in_their_interface_disagree() -> None:
    bound = policy(selector(ifindex=2), TUNNEL)
    assert not live([NET, bound], [SA])
    assert not live([bound, NET], [SA])


def test_protocol_and_masked_ports_must_match() -> None:
    dns = policy(selector(proto=UDP, dport=5296, dport_mask=0xFFF0), TUNNEL)
    assert live([dns], [SA], replace(FLOW, proto=UDP, dport=5300))
    assert not live([dns], [SA], replace(FLOW, proto=UDP, dport=5312))
    assert not live([dns], [SA], replace(FLOW, proto=TCP, dport=5300))


def test_a_policy_must_match_the_flows_mark_and_a_state_the_policys() -> None:
    marked = policy(selector(), TUNNEL, mark=Mark(5, 0xFF))
    flow = replace(FLOW, mark=0x105)
    assert live([marked], [SA], flow)
    assert not live([marked], [SA])
    assert live([marked], [replace(SA, mark=Mark(5, 0xFF))], flow)
    assert not live([marked], [replace(SA, mark=Mark(6, 0xFF))], flow)
    assert not live([NET], [replace(SA, mark=Mark(5, 0xFF))], flow)
    assert not live([policy(selector(), TUNNEL, mark=Mark(5, 0x2))], [SA], flow)


def test_policies_for_other_marks_and_interfaces_do_not_apply() -> None:
    block = policy(selector(), priority=1, mark=Mark(5, 0xFF))
    assert live([NET, block], [SA])
    assert not live([NET, block], [SA], replace(FLOW, mark=5))
    assert live([NET, policy(selector(), priority=1, if_id=3)], [SA])
    assert not live([NET, policy(selector(ifindex=2), TUNNEL, priority=1)], [SA])


def test_a_template_after_a_tunnel_protects_the_outer_packet() -> None:
    nested = policy(selector(), TUNNEL, replace(TRANSPORT, reqid=2))
    around = replace(TRANSPORT_SA, id=SaId(PEER, 0x2000, ESP), reqid=2)
    inside = replace(around, id=SaId(FLOW.daddr, 0x2000, ESP), saddr=ip_address("10.1.0.1"))
    assert live([nested], [SA, around])
    assert not live([nested], [SA, inside])
    before = policy(selector(), replace(TRANSPORT, reqid=2), TUNNEL)
    assert live([before], [SA, inside])
    assert not live([before], [SA, around])
    perhaps = policy(selector(), replace(TUNNEL, optional=True), replace(TRANSPORT, reqid=2))
    assert not live([perhaps], [SA, inside])


def test_compression_alone_protects_nothing() -> None:
    comp = replace(TRANSPORT, proto=COMP, reqid=2)
    packed = replace(
        TRANSPORT_SA, id=SaId(FLOW.daddr, 0x20, COMP), saddr=ip_address("10.1.0.1"), reqid=2
    )
    assert not live([policy(selector(), comp)], [packed])
    assert live([policy(selector(), comp, TUNNEL)], [packed, SA])
    assert not live([policy(selector(), comp, TUNNEL)], [SA])


def test_a_state_bound_to_an_interface_protects_nothing() -> None:
    assert not live([NET], [replace(SA, selector=selector(ifindex=2))])


UNBOUND = replace(FLOW, sport=0)


@pytest.mark.parametrize(
    ("sport", "mask", "chosen"),
    [(22, 0xFFFF, False), (5000, 0xFFFF, False), (32768, 0xFFFF, True), (60999, 0xFFFF, True),
     (61000, 0xFFFF, False), (0, 0xFF00, True), (40000, 0xFF00, True), (1, 1, True)],
)  # fmt: skip
def test_an_unbound_source_port_may_become_any_ephemeral_port(
    sport: int, mask: int, chosen: bool
) -> None:
    by_port = policy(selector(sport=sport, sport_mask=mask), priority=50, action=Action.BYPASS)
    assert live([NET, by_port], [SA], UNBOUND) is not chosen
    assert not live([by_port], [SA], UNBOUND)
    assert not live([NET, by_port], [SA], replace(FLOW, sport=sport))
    tied = replace(by_port, priority=NET.priority)
    assert live([NET, tied], [SA], UNBOUND) is not chosen


def test_a_state_for_some_source_ports_does_not_protect_an_unbound_one() -> None:
    low = replace(SA, selector=selector(sport=0, sport_mask=0x8000))
    assert not live([NET], [low], UNBOUND)
    assert live([NET], [low], replace(FLOW, sport=5000))
    assert live([NET], [low, replace(SA, id=SaId(PEER, 0x2000, ESP))], UNBOUND)


def test_an_unknown_mode_protects_nothing_and_affects_no_other_policy() -> None:
    odd = replace(SA, id=SaId(PEER, 0x2000, ESP), reqid=2, mode=Mode.UNKNOWN)
    there = policy(selector(dst="10.3.0.0/16"), replace(TUNNEL, reqid=2, mode=Mode.UNKNOWN))
    assert not live([NET, there], [SA, odd], replace(FLOW, daddr=ip_address("10.3.0.9")))
    assert live([NET, there], [SA, odd])


def test_families_do_not_mix() -> None:
    everything6 = policy(selector("::/0", "::/0"), TUNNEL)
    assert not live([everything6], [SA])
    v6 = Flow(ip_address("2001:db8::1"), TCP, 80, ip_address("2001:db8::2"))
    assert live([everything6], [SA], v6)
    assert not live([NET], [SA], v6)
