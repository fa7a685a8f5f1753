"""The inspector process's answers as bytes: a whole finding, or nothing."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipsecgate.core.codec.seccomp import Notification, notification, packed
from ipsecgate.core.model.flow import Flow, unmap
from ipsecgate.edges.holding.inspector_main import ANSWER, Finding, decode, encode

PORTS = st.integers(0, 2**16 - 1)
WORDS = st.integers(0, 2**32 - 1)
ADDRESSES = st.one_of(
    st.builds(IPv4Address, WORDS), st.builds(IPv6Address, st.integers(1, 2**128 - 1)).map(unmap)
)
FLOWS = st.builds(Flow, ADDRESSES, st.integers(0, 255), PORTS, st.none() | ADDRESSES, PORTS, WORDS)


@given(FLOWS, st.booleans())
def test_a_finding_survives_encoding(flow: Flow, blocking: bool) -> None:
    finding = Finding(flow, blocking)
    assert decode(encode(finding)) == finding


def test_nothing_survives_encoding() -> None:
    assert decode(encode(None)) is None


@given(st.binary(min_size=ANSWER.size, max_size=ANSWER.size))
def test_any_bytes_are_a_finding_or_nothing(raw: bytes) -> None:
    finding = decode(raw)
    assert finding is None or encode(finding)[1:] == raw[1:]


@pytest.mark.parametrize("length", [0, ANSWER.size - 1, ANSWER.size + 1])
def test_bytes_of_another_length_are_nothing(length: int) -> None:
    assert decode(b"\2" * length) is None


@given(st.builds(Notification, st.integers(0, 2**64 - 1), WORDS, st.integers(0, 999), WORDS,
                 st.tuples(*[st.integers(0, 2**64 - 1)] * 6)))  # fmt: skip
def test_a_notification_survives_encoding(call: Notification) -> None:
    assert notification(packed(call)) == call
