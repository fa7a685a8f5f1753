"""Listeners: which are accepted, and which calls a new controller recovers. The kernel is faked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ipsecgate.core.codec.seccomp import Notification, packed
from ipsecgate.edges.holding import seccomp
from ipsecgate.edges.holding.listener import Listener
from ipsecgate.edges.holding.listeners import Listeners


@pytest.mark.parametrize("limit", [float("nan"), float("inf"), -1.0, 1e8 + 1])
async def test_a_limit_that_no_timer_accepts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float
) -> None:
    """JSON allows NaN, and a timer at NaN breaks the order of the loop's other timers."""
    monkeypatch.setattr(seccomp, "is_listener", lambda _fd: True)
    fd, other = os.pipe()
    listeners = Listeners(lambda _event: None, tmp_path)
    with pytest.raises(ValueError, match="cannot be held"):
        listeners.add(fd, limit)
    os.close(other)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.close(fd)


def test_a_pending_call_without_a_pid_is_recovered_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports pid 0 for a thread outside of the controller's pid namespace."""
    monkeypatch.setattr(seccomp, "is_waiting", lambda _fd, _ident: True)
    call = Notification(7, 0, 42, 0xC000003E, (3, 0, 16, 0, 0, 0))
    file = tmp_path / "1"
    file.write_bytes(packed(call))
    fd, other = os.pipe()
    listener = Listener(1, fd, 30.0, file)
    assert listener.recall() == [(call, 0.0)]
    listener.close()
    os.close(other)
