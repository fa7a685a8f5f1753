"""Netlink framing: requests for dumps, and the end of a dump."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipsecgate.core.codec.netlink import DecodeError, DumpEnd, dump_end
from ipsecgate.core.codec.xfrm import encode_policy_dump, encode_sa_dump
from tests.unit.xfrm_bytes import NEWSA, message, state


def test_dump_requests_match_the_kernel_layout() -> None:
    assert encode_policy_dump(5) == message(0x15, bytes(64), 0x301, 5)
    assert encode_sa_dump(6) == message(0x12, bytes(24), 0x301, 6)


@pytest.mark.parametrize(
    ("data", "end"),
    [
        (message(NEWSA, state(), flags=2), None),
        (message(3, struct.pack("=i", 0), flags=2), DumpEnd(0)),
        (message(2, struct.pack("=i", -1) + bytes(16)), DumpEnd(1)),
        (message(3, struct.pack("=i", 0), flags=0x12), DumpEnd(0, interrupted=True)),
        (message(3, bytes(4), 2, 8), None),
    ],
)
def test_the_end_of_a_dump_is_recognised(data: bytes, end: DumpEnd | None) -> None:
    assert dump_end(data, 7) == end


@pytest.mark.parametrize("errno", [1, 4096, -4096, -(2**31), 2**31 - 1])
def test_an_impossible_errno_is_an_error(errno: int) -> None:
    """-2^31 was read as errno 2^31, for which os.strerror() raises OverflowError."""
    with pytest.raises(DecodeError, match="errno"):
        dump_end(message(3, struct.pack("=i", errno)), 7)


@given(st.binary(max_size=64))
def test_arbitrary_bytes_raise_no_other_error(data: bytes) -> None:
    with suppress(DecodeError):
        dump_end(data, 7)
