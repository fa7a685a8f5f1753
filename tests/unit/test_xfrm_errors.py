"""The XFRM codec with malformed, truncated and random input: the events before an error count."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipsecgate.core.codec.netlink import DecodeError
from ipsecgate.core.codec.xfrm import decode
from ipsecgate.core.model.events import (
    SaSet,
    XfrmEvent,
)
from ipsecgate.core.model.ipsec import (
    Mode,
)
from tests.unit.xfrm_bytes import (
    ALL,
    DELPOLICY,
    FLUSHSA,
    MARK,
    NEWPOLICY,
    NEWSA,
    OUT,
    POLICY,
    TMPL,
    TUNNEL,
    TYPES,
    attribute,
    message,
    policy,
    selector,
    state,
)


@pytest.mark.parametrize(
    ("data", "kind", "field", "offset"),
    [
        (bytes(15), 0, "message header", 0),
        (struct.pack("=IHHII", 15, NEWSA, 0, 0, 0), NEWSA, "message length", 0),
        (struct.pack("=IHHII", 17, NEWSA, 0, 0, 0), NEWSA, "message length", 0),
        (message(NEWPOLICY, policy(selector())[:-1]), NEWPOLICY, "xfrm_userpolicy_info", 16),
        (message(DELPOLICY, selector() + bytes(8)), DELPOLICY, "XFRMA_POLICY (missing)", 80),
        (message(DELPOLICY, selector() + bytes(8) + attribute(POLICY, bytes(167))), DELPOLICY,
         "XFRMA_POLICY", 84),
        (message(NEWPOLICY, policy(selector()) + attribute(TMPL, TUNNEL[:-4])), NEWPOLICY,
         "XFRMA_TMPL", 188),
        (message(NEWPOLICY, policy(selector()) + struct.pack("=HH", 3, 5)), NEWPOLICY,
         "attribute length", 184),
        (message(NEWPOLICY, policy(selector()) + b"\1\2\0\0"[:2]), NEWPOLICY,
         "attribute header", 184),
        (message(NEWPOLICY, policy(selector()) + attribute(MARK, bytes(4))), NEWPOLICY,
         "XFRMA_MARK", 188),
        (message(NEWPOLICY, policy(selector(family=0))), NEWPOLICY, "sel.family", 56),
        (message(NEWSA, state(family=3)), NEWSA, "family 3", 228),
        (message(FLUSHSA, b""), FLUSHSA, "xfrm_usersa_flush", 16),
    ],
)  # fmt: skip
def test_an_error_names_message_field_and_offset(
    data: bytes, kind: int, field: str, offset: int
) -> None:
    good = TYPES["NEWSA"][0]
    events, error = take(good + data)
    assert events == [SaSet(OUT)]
    assert error is not None
    assert error.hint
    assert (error.message_type, error.field, error.offset) == (kind, field, len(good) + offset)


@pytest.mark.parametrize("bits", [33, 129, 255])
def test_a_prefix_longer_than_the_address_is_an_error(bits: int) -> None:
    with pytest.raises(DecodeError, match="sel"):
        list(decode(message(NEWPOLICY, policy(selector(dst=f"10.2.0.0/{bits}")))))


def test_a_truncated_datagram_yields_the_events_before_the_cut() -> None:
    """Cut elsewhere than between two messages, there is also an error."""
    whole = [event for _, event in TYPES.values()]
    fits, at = {0}, 0
    for data, _ in TYPES.values():
        (length,) = struct.unpack_from("=I", data)
        fits |= set(range(at + length, at + len(data) + 1))  # padding may be missing
        at += len(data)
    for end in range(len(ALL) + 1):
        events, error = take(ALL[:end])
        assert events == whole[: len(events)]
        assert (error is None) == (end in fits)


@given(st.binary(max_size=400))
def test_arbitrary_bytes_raise_no_other_error(data: bytes) -> None:
    survive(data)


@given(st.data())
def test_damaged_messages_raise_no_other_error(data: st.DataObject) -> None:
    damaged = bytearray(ALL)
    for at in data.draw(st.lists(st.integers(0, len(ALL) - 1), min_size=1, max_size=8)):
        damaged[at] = data.draw(st.integers(0, 255))
    survive(bytes(damaged))


def survive(data: bytes) -> None:
    _, error = take(data)
    assert error is None or 0 <= error.offset <= len(data)


def take(data: bytes) -> tuple[list[XfrmEvent], DecodeError | None]:
    """Return the events before the first error, and the error."""
    events = []
    try:
        for event in decode(data):
            events.append(event)  # those before the error count
    except DecodeError as error:
        return events, error
    return events, None


def test_an_unknown_mode_does_not_stop_the_decoder() -> None:
    """A dump with one such state from a newer kernel ended the controller at every start."""
    events, error = take(message(NEWSA, state(mode=6)) + TYPES["NEWSA"][0])
    assert error is None
    unknown, known = events
    assert isinstance(unknown, SaSet)
    assert unknown.sa.mode is Mode.UNKNOWN
    assert known == SaSet(OUT)
