"""The messages between controller and inspectors: complete, or none."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipsecgate.core.model.flow import Flow, unmap
from ipsecgate.edges.holding.look import Finding
from ipsecgate.edges.holding.messages import (
    LOOKING,
    MESSAGE,
    STARTED,
    Kind,
    Question,
    decode,
    encode,
)

PORTS = st.integers(0, 2**16 - 1)
WORDS = st.integers(0, 2**32 - 1)
LONG_WORDS = st.integers(0, 2**64 - 1)
ADDRESSES = st.one_of(
    st.builds(IPv4Address, WORDS), st.builds(IPv6Address, st.integers(1, 2**128 - 1)).map(unmap)
)
FLOWS = st.builds(Flow, ADDRESSES, st.integers(0, 255), PORTS, st.none() | ADDRESSES, PORTS, WORDS)
QUESTIONS = st.builds(Question, WORDS, LONG_WORDS, WORDS, st.builds(Finding, FLOWS, st.booleans()))


@given(QUESTIONS)
def test_an_encoded_question_decodes_to_itself(question: Question) -> None:
    assert decode(encode(question)) == question


def test_the_other_messages_decode_to_their_kind() -> None:
    assert decode(STARTED) is Kind.STARTED
    assert decode(LOOKING) is Kind.LOOKING


@given(st.binary(min_size=MESSAGE.size, max_size=MESSAGE.size))
def test_any_bytes_decode_to_a_message_or_none(raw: bytes) -> None:
    message = decode(raw)
    if isinstance(message, Question):
        assert encode(message) == raw
    else:
        assert message in (None, *Kind)


@pytest.mark.parametrize("length", [0, MESSAGE.size - 1, MESSAGE.size + 1])
def test_a_message_of_another_length_decodes_to_none(length: int) -> None:
    assert decode(b"\2" * length) is None
