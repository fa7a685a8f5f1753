"""A listening socket accepts clients, and retries cheaply when no descriptor is free."""

from __future__ import annotations

import asyncio
import errno
import logging
import resource
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ipsecgate.edges.host import unix_sockets
from ipsecgate.edges.host.unix_sockets import listening
from tests.until import until


@contextmanager
def no_descriptors() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as lowest:
        limit = lowest.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def client(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.connect(str(path))
    return made


async def test_clients_are_accepted_until_the_listener_ends(tmp_path: Path) -> None:
    path, taken = tmp_path / "x.sock", list[socket.socket]()
    path.touch()  # left by an earlier controller
    with listening(path, taken.append):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        made = [client(path) for _ in range(3)]
        await until(lambda: len(taken) == 3)
        assert not any(one.getblocking() for one in taken)
    assert not path.exists()
    for one in (*made, *taken):
        one.close()


async def test_without_descriptors_accepting_is_logged_once_and_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An asyncio server makes a hundred timers and log lines after its first failure."""
    monkeypatch.setattr(unix_sockets, "RETRY", 0.05)
    caplog.set_level(logging.WARNING, "ipsecgate")
    path, taken = tmp_path / "x.sock", list[socket.socket]()
    loop = asyncio.get_running_loop()
    timers = 0
    later = loop.call_later

    def counted(delay: float, *rest: object) -> asyncio.TimerHandle:
        nonlocal timers
        timers += delay == unix_sockets.RETRY
        return later(delay, *rest)  # type: ignore[arg-type]

    with listening(path, taken.append), client(path) as made:
        monkeypatch.setattr(loop, "call_later", counted)
        began = loop.time()
        with no_descriptors():
            await until(lambda: timers >= 5)
        assert not taken
        assert timers <= 1 + (loop.time() - began) / unix_sockets.RETRY
        assert [each.getMessage() for each in caplog.records] == [
            "cannot accept new clients for now: Too many open files"
        ]
        await until(lambda: taken)
        made.send(b"x")
        assert taken[0].recv(1) == b"x"
    taken[0].close()


async def test_a_listener_can_end_while_a_client_waits(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    with listening(path, lambda one: one.close()), client(path), no_descriptors():
        await asyncio.sleep(0.02)
    await asyncio.sleep(0)


async def test_any_other_error_reaches_the_exception_handler(tmp_path: Path) -> None:
    found: list[BaseException] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda loop, context: found.append(context["exception"])
    )

    def broken(one: socket.socket) -> None:
        one.close()
        raise OSError(errno.EBADF, "a defect")

    with listening(tmp_path / "x.sock", broken), client(tmp_path / "x.sock"):
        await asyncio.sleep(0.02)
    assert [str(error) for error in found] == ["[Errno 9] a defect"]
