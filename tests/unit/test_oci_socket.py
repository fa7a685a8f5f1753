"""The socket that receives listeners and messages from container runtimes."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ipsecgate.core.codec.oci import Container
from ipsecgate.edges.holding import oci as edge
from tests.unit.oci_messages import STATE
from tests.until import until


class Agent:
    """The agent's socket, with the listeners that it accepted and the errors that it logged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.taken: list[tuple[Container, int]] = []
        self.errors: list[str] = []

    def take(self, made: Container, listener: int) -> None:
        self.taken.append((made, listener))

    async def send(self, *parts: bytes, fds: tuple[int, ...] = (), end: bool = True) -> None:
        """Send as a runtime does; return when the agent has closed. `end`: shut down after it."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self.path))
            for part in parts:
                socket.send_fds(sock, [part], fds if part is parts[0] else ())
                await asyncio.sleep(0.01)
            if end:
                sock.shutdown(socket.SHUT_WR)
            sock.setblocking(False)
            async with asyncio.timeout(5):
                assert not await asyncio.get_running_loop().sock_recv(sock, 1)


@asynccontextmanager
async def agent(path: Path) -> AsyncIterator[Agent]:
    made = Agent(path)
    running = asyncio.create_task(edge.run(path, made.take, made.errors.append))
    await until(path.exists)
    yield made
    assert not running.done(), "no message ends the agent"
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not path.exists()


def open_fds() -> list[str]:
    return os.listdir("/proc/self/fd")  # noqa: PTH208


async def test_a_listener_is_received_with_its_message(tmp_path: Path) -> None:
    with Path(os.devnull).open() as some:
        async with agent(tmp_path / "s") as here:
            assert here.path.stat().st_mode & 0o777 == 0o600
            raw = json.dumps(STATE).encode()
            await here.send(raw[:9], raw[9:], fds=(some.fileno(),), end=False)
            [(made, fd)] = here.taken
    assert (made.name, here.errors) == ("db", [])
    assert os.path.sameopenfile(fd, os.open(os.devnull, os.O_RDONLY))
    assert not os.get_inheritable(fd)
    os.close(fd)


@pytest.mark.parametrize(
    "send",
    [
        lambda here, fd: here.send(json.dumps(STATE).encode()),
        lambda here, fd: here.send(b'{"pid": 1', fds=(fd,)),
        lambda here, fd: here.send(b"no json", fds=(fd,)),
        lambda here, fd: here.send(b"{}", fds=(fd,), end=False),
        lambda here, fd: here.send(json.dumps(STATE).encode(), fds=(fd,) * 9, end=False),
    ],
    ids=["no descriptor", "half", "no json", "empty", "too many descriptors"],
)
async def test_an_invalid_message_is_reported_and_its_descriptors_are_closed(
    tmp_path: Path, send: Callable[[Agent, int], Any]
) -> None:
    before = open_fds()
    async with agent(tmp_path / "s") as here:
        with Path(os.devnull).open() as some:
            await send(here, some.fileno())
        assert here.taken == []
        assert len(here.errors) == 1
    assert len(open_fds()) == len(before)


async def test_a_silent_connection_does_not_delay_the_others(tmp_path: Path) -> None:
    async with agent(tmp_path / "s") as here:
        with socket.socket(socket.AF_UNIX) as idle:
            idle.connect(str(here.path))
            await here.send()
            with Path(os.devnull).open() as some:
                await here.send(json.dumps(STATE).encode(), fds=(some.fileno(),), end=False)
        assert here.errors == []
        [(_, fd)] = here.taken
        os.close(fd)


async def test_silent_runtimes_beyond_the_limit_are_disconnected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edge, "PEERS", 3)
    async with agent(tmp_path / "s") as here:
        silent = [socket.socket(socket.AF_UNIX) for _ in range(3)]
        for each in silent:
            each.connect(str(here.path))
        await here.send(end=False)  # disconnected
        assert len(here.errors) == 1
        silent.pop().close()
        await asyncio.sleep(0.05)
        with Path(os.devnull).open() as some:
            await here.send(json.dumps(STATE).encode(), fds=(some.fileno(),), end=False)
        [(_, fd)] = here.taken
        os.close(fd)
        for each in silent:
            each.close()
