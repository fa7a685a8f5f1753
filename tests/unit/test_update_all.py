"""A batch of entries that the kernel had no memory for is written completely in the end."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from ipsecgate.edges.bpf import libbpf

ITEMS = [(bytes([n, 0]), bytes([n])) for n in range(40)]
ALL = 1 << 32


@pytest.mark.parametrize(
    "set_before_failing",
    [[None], [0], [7], [None, 7, None, 0, 32], [1] * 39, []],
)
def test_every_entry_is_written_whatever_count_a_failure_leaves(
    monkeypatch: pytest.MonkeyPatch, set_before_failing: list[int | None]
) -> None:
    """`None`: a kernel before Linux 6.8, which fails before it sets the count."""
    written: dict[bytes, bytes] = {}
    failures = iter(set_before_failing)

    def call(_operation: str, _function: str, _fd: int, *args: Any) -> int:
        keys, values, reference, _opts = args
        offered, failure = reference._obj.value, next(failures, ALL)
        done = min(failure or 0, offered)
        for n in range(done):
            written[keys[2 * n : 2 * n + 2]] = values[n : n + 1]
        if failure == ALL:
            return 0
        if failure is not None:
            reference._obj.value = done
        raise OSError(errno.ENOMEM, "update map")

    monkeypatch.setattr(libbpf, "call", call)
    libbpf.update_all(3, ITEMS)
    assert written == dict(ITEMS)
