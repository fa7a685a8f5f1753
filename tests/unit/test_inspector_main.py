"""The messages between controller and inspector process: complete, or none."""

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
def test_an_encoded_finding_decodes_to_itself(flow: Flow, blocking: bool) -> None:
    finding = Finding(flow, blocking)
    assert decode(encode(finding)) == finding


def test_an_empty_answer_decodes_to_none() -> None:
    assert decode(encode(None)) is None


@given(st.binary(min_size=ANSWER.size, max_size=ANSWER.size))
def test_any_bytes_decode_to_a_finding_or_none(raw: bytes) -> None:
    finding = decode(raw)
    assert finding is None or encode(finding)[1:] == raw[1:]


@pytest.mark.parametrize("length", [0, ANSWER.size - 1, ANSWER.size + 1])
def test_an_answer_of_another_length_decodes_to_none(length: int) -> None:
    assert decode(b"\2" * length) is None


@given(st.builds(Notification, st.integers(0, 2**64 - 1), WORDS, st.integers(0, 999), WORDS,
                 st.tuples(*[st.integers(0, 2**64 - 1)] * 6)))  # fmt: skip
def test_a_notification_is_packed_as_the_kernel_wrote_it(call: Notification) -> None:
    assert notification(packed(call)) == call
