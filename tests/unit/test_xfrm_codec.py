"""The XFRM codec against messages made by hand and against damaged ones."""

from __future__ import annotations

import struct
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from ipsecgate.core.codec.xfrm import decode
from ipsecgate.core.model.events import (
    PolicyGone,
    PolicySet,
    SaSet,
    SasFlushed,
)
from ipsecgate.core.model.flow import Selector
from ipsecgate.core.model.ipsec import (
    ESP,
    Action,
    Direction,
    Mark,
    Mode,
    Sa,
    SaId,
    SpdEntry,
    SpdKey,
    Template,
)
from tests.unit.xfrm_bytes import (
    ALL,
    CIPHER,
    DELPOLICY,
    EXPIRE,
    FLUSHPOLICY,
    FOREVER,
    IF_ID,
    MARK,
    NET,
    NEWPOLICY,
    NEWSA,
    OUT,
    POLEXPIRE,
    POLICY,
    POLICY_TYPE,
    SA_PCPU,
    TMPL,
    TUNNEL,
    TYPES,
    V6,
    attribute,
    message,
    policy,
    selector,
    state,
    template,
)


@pytest.mark.parametrize("name", TYPES)
def test_each_message_type_becomes_its_event(name: str) -> None:
    data, event = TYPES[name]
    assert list(decode(data)) == [event]


def test_a_datagram_is_decoded_in_order() -> None:
    assert list(decode(ALL)) == [event for _, event in TYPES.values()]
    assert list(decode(b"")) == []


@pytest.mark.parametrize(
    "data",
    [
        message(0x3FF, b"what is this"),
        message(0x17, bytes(280)),  # ACQUIRE
        message(0x1E, bytes(56)),  # NEWAE
        message(3, bytes(4)),  # NLMSG_DONE
        message(NEWPOLICY, policy(selector(), direction=2)),
        message(NEWPOLICY, policy(selector(), direction=3)),
        message(NEWPOLICY, policy(selector(), direction=4)),
        message(NEWPOLICY, policy(selector()) + attribute(POLICY_TYPE, b"\1" + bytes(5))),
        message(POLEXPIRE, policy(selector()) + bytes(8)),
        message(FLUSHPOLICY, attribute(POLICY_TYPE, b"\1" + bytes(5))),
        message(EXPIRE, state() + bytes(8)),
    ],
    ids=[
        *("unknown", "acquire", "aevent", "done", "fwd", "socket in", "socket out"),
        *("sub policy", "policy expires soft", "sub policies flushed", "SA expires soft"),
    ],
)
def test_irrelevant_messages_are_skipped(data: bytes) -> None:
    assert list(decode(data + TYPES["FLUSHSA"][0])) == [SasFlushed()]


def one_policy(body: bytes) -> SpdEntry:
    (event,) = decode(message(NEWPOLICY, body))
    assert isinstance(event, PolicySet)
    return event.entry


@pytest.mark.parametrize("direction", Direction)
def test_a_policy_keeps_its_direction(direction: Direction) -> None:
    entry = one_policy(policy(selector(), direction=direction))
    assert entry.key == replace(NET.key, direction=direction)
    gone = message(DELPOLICY, selector() + bytes(8)
                   + attribute(POLICY, policy(selector(), direction=direction)))  # fmt: skip
    assert list(decode(gone)) == [PolicyGone(entry.key)]


def one_sa(body: bytes) -> Sa:
    (event,) = decode(message(NEWSA, body))
    assert isinstance(event, SaSet)
    return event.sa


def test_every_field_of_a_policy_is_decoded() -> None:
    sel = selector(
        *("2001:db8::1/128", "2001:db8:2::/48"),
        proto=17,
        ports=(5296, 0xFFF0, 53, 0xFFFF),
        ifindex=4,
    )
    wildcard = template(None, None, V6, reqid=0x80000001, mode=0, proto=51, optional=1)
    entry = one_policy(
        policy(sel, priority=0xFFFFFFFE, index=0x12345678)
        + attribute(TMPL, wildcard + TUNNEL)
        + attribute(POLICY_TYPE, bytes(6))
        + attribute(MARK, struct.pack("=II", 0x12, 0xFFF))
        + attribute(IF_ID, struct.pack("=I", 77))
    )
    assert entry == SpdEntry(
        SpdKey(
            Selector(
                *(ip_network("2001:db8::1/128"), ip_network("2001:db8:2::/48")),
                *(17, 53, 0xFFFF, 5296, 0xFFF0, 4),
            ),
            Mark(0x12, 0xFFF),
            77,
        ),
        0xFFFFFFFE,
        Action.PROTECT,
        (Template(51, Mode.TRANSPORT, 0x80000001, optional=True), *NET.templates),
        0x12345678,
    )


def test_policies_that_differ_beyond_the_prefix_have_different_keys() -> None:
    one = one_policy(policy(selector("10.1.0.0/16", "10.2.0.0/16")))
    other = one_policy(policy(selector("10.1.0.7/16", "10.2.0.9/16")))
    six = one_policy(policy(selector("2001:db8::1/64", "2001:db8:1::/64")))
    assert one.key.selector == other.key.selector
    assert (one.key.host_bits, other.key.host_bits) == ((0, 0), (7, 9))
    assert six.key.host_bits == (1, 0)


@pytest.mark.parametrize(
    ("action", "templates", "meaning"),
    [
        (0, TUNNEL, Action.PROTECT),
        (0, b"", Action.BYPASS),
        (1, b"", Action.DISCARD),
        (1, TUNNEL, Action.DISCARD),
    ],
)
def test_the_action_depends_on_the_templates(
    action: int, templates: bytes, meaning: Action
) -> None:
    body = policy(selector(), action=action) + (attribute(TMPL, templates) if templates else b"")
    assert one_policy(body).action is meaning


def test_a_selector_keeps_only_the_bits_of_its_prefix() -> None:
    key = one_policy(policy(selector("10.1.2.3/16", "10.2.3.4/31"))).key
    assert key.selector == Selector(ip_network("10.1.0.0/16"), ip_network("10.2.3.4/31"))


def test_every_field_of_a_state_is_decoded() -> None:
    sel = selector("2001:db8::1/128", "2001:db8::2/128")
    body = state("2001:db8::1", "2001:db8::2", 1, sel=sel, reqid=5, mode=0, hard=FOREVER, added=0)
    marks = attribute(MARK, struct.pack("=II", 1, 2)) + attribute(IF_ID, struct.pack("=I", 3))
    host, peer = ip_address("2001:db8::1"), ip_address("2001:db8::2")
    assert one_sa(body + CIPHER + marks) == Sa(
        SaId(peer, 1, ESP),
        host,
        5,
        Mode.TRANSPORT,
        Selector(ip_network(host), ip_network(peer)),
        Mark(1, 2),
        3,
    )


@pytest.mark.parametrize("cpu", [0, 1])
def test_a_state_for_one_cpu_keeps_its_number(cpu: int) -> None:
    body = state() + CIPHER + attribute(SA_PCPU, struct.pack("=I", cpu))
    assert one_sa(body) == replace(OUT, cpu=cpu)


@pytest.mark.parametrize(
    ("body", "larval"),
    [
        (state(spi=0) + CIPHER, True),
        (state(), True),
        (state() + attribute(19, bytes(8)), True),
        *((state() + attribute(kind, bytes(72)), False) for kind in (1, 2, 3, 18, 20)),
    ],
)
def test_a_state_without_spi_or_algorithm_is_larval(body: bytes, larval: bool) -> None:
    assert one_sa(body).larval is larval


@pytest.mark.parametrize(("hard", "lifetime"), [(0, None), (FOREVER, None), (1, 1)])
def test_a_lifetime_of_zero_or_infinity_is_none(hard: int, lifetime: int | None) -> None:
    assert one_sa(state(hard=hard)).hard_lifetime == lifetime
