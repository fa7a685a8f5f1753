"""Records and map values that no hook can have written raise an error.

test_service shows that such an error ends the controller; the hooks then keep refusing.
"""

from __future__ import annotations

import ctypes as ct
from collections.abc import Callable
from typing import Any

import pytest

from ipsecgate.core.model.events import FlowRefused
from ipsecgate.core.tables import layout, packed
from ipsecgate.core.tables.layout import LayoutError
from ipsecgate.core.tables.packed import unpack_event
from ipsecgate.edges.bpf import libbpf
from ipsecgate.edges.bpf.ring import Ring
from ipsecgate.errors import GateError

GOOD = packed._EVENT.pack(
    1,
    2,
    0,
    layout.pack_key(layout.Key(family=4)),
    layout.Reason.REFUSE_UNCOVERED,
    0,
    7,
    1,
    0,
    0,
    b"curl",
)
BAD = GOOD[:-1]


@pytest.mark.parametrize(
    "unpack",
    [
        lambda raw: packed.unpack_entry(raw, 0),
        packed.unpack_answer,
        layout.unpack_key,
        packed.unpack_mask,
        unpack_event,
    ],
)
@pytest.mark.parametrize("size", [0, 1, 47, 49, 88])
def test_a_value_of_another_size_is_an_error(unpack: Callable[[bytes], object], size: int) -> None:
    """A bare struct.error would name neither the value nor a remedy."""
    with pytest.raises(LayoutError, match="bytes, expected") as caught:
        unpack(bytes(size))
    assert isinstance(caught.value, GateError)
    assert "systemctl restart ipsecgate" in caught.value.hint


class Library:
    """The ring buffer functions of libbpf: consume() calls back from C with each waiting record."""

    def __init__(self) -> None:
        self.waiting: list[bytes] = []

    def ring_buffer__new(self, _fd: int, callback: Any, *_: object) -> int:
        self._call = ct.cast(callback, libbpf.RingCallback)  # as C calls it: by address
        return 1

    def ring_buffer__epoll_fd(self, _ring: int) -> int:
        return 0

    def ring_buffer__consume(self, _ring: int) -> int:
        taken, self.waiting = self.waiting, []
        for record in taken:
            if self._call(None, ct.cast(ct.c_char_p(record), ct.c_void_p), len(record)) < 0:
                return -1
        return len(taken)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setattr(libbpf, "library", lambda: made)
    return made


def test_a_malformed_record_raises_once(library: Library) -> None:
    found: list[FlowRefused] = []
    ring = Ring(0, lambda record: found.append(unpack_event(record)))
    library.waiting = [GOOD, BAD]
    with pytest.raises(LayoutError, match=f"event of {len(BAD)} bytes"):
        ring.consume()
    assert [event.comm for event in found] == ["curl"]
    library.waiting = [GOOD]
    assert ring.consume() == 1, "raised once"


def test_a_lifetime_of_centuries_fits_the_map() -> None:
    """It raised struct.error, so one such SA ended the controller at every start."""
    entry = layout.Entry(layout.State.LIVE, deadline=2**64)
    raw = packed.pack_answer(entry, boot=10**18)
    found = packed.unpack_answer(raw)
    assert found is not None
    assert found.deadline > 200 * 365 * 86400
    ends = layout.Entry(layout.State.LIVE, deadline=2_000_000_000)
    assert packed.unpack_answer(packed.pack_answer(ends, 10**18), 10**18) == ends
