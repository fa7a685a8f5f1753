"""The IKE daemon's lists are read while something happens, and left alone while nothing does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ipsecgate.controller import ike_follower
from ipsecgate.controller.ike_follower import IkeFollower
from ipsecgate.core.model import events as on
from tests.unit.fake_charon import FakeCharon, Section, Session, streaming
from tests.unit.vici_messages import conn
from tests.until import until

POLL = 0.05


async def stats(_session: Session, _asked: Section) -> Section:
    return {"plugins": ["kernel-netlink"]}


def charon_at(path: Path, *, logs: bool) -> FakeCharon:
    charon = FakeCharon(path)
    charon.handlers = {
        "stats": stats,
        "list-conns": streaming("list-conn", conn()),
        "list-sas": streaming("list-sa"),
    }
    if logs:
        charon.known.add("log")
    return charon


def polls(charon: FakeCharon) -> int:
    return sum(name == "list-conns" for name, _ in charon.requests)


@asynccontextmanager
async def following(path: Path) -> AsyncIterator[tuple[IkeFollower, list[on.Event]]]:
    delivered: list[on.Event] = []
    follower = IkeFollower(path, delivered.append)
    task = asyncio.create_task(follower.run())
    try:
        yield follower, delivered
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"POLL": POLL, "PAUSE": 0.01, "PAUSE_LAST": 0.02, "LOADING": 0.1}.items():
        monkeypatch.setattr(ike_follower, name, seconds)


async def test_an_idle_daemon_is_left_alone_until_something_happens(tmp_path: Path) -> None:
    async with (
        charon_at(tmp_path / "vici", logs=True) as charon,
        following(charon.path) as (follower, _),
    ):
        await until(lambda: polls(charon) > 0)
        await asyncio.sleep(4 * POLL)
        idle = polls(charon)
        await asyncio.sleep(10 * POLL)
        assert polls(charon) == idle
        follower.stir()
        await until(lambda: polls(charon) == idle + 1)


async def test_a_connection_that_is_loaded_is_listed_at_once_and_again(tmp_path: Path) -> None:
    async with (
        charon_at(tmp_path / "vici", logs=True) as charon,
        following(charon.path) as (_, _delivered),
    ):
        await until(lambda: polls(charon) > 0)
        await asyncio.sleep(4 * POLL)
        idle = polls(charon)
        charon.raise_event("log", {"msg": "loaded certificate 'CN=other'"})
        await asyncio.sleep(4 * POLL)
        assert polls(charon) == idle
        charon.raise_event("log", {"msg": "added vici connection: net"})
        await until(lambda: polls(charon) == idle + 2)


async def test_a_daemon_that_cannot_say_so_is_polled(tmp_path: Path) -> None:
    async with charon_at(tmp_path / "vici", logs=False) as charon, following(charon.path):
        await until(lambda: polls(charon) > 5)


async def test_a_socket_that_appears_ends_the_pause_between_two_attempts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ike_follower, "RETRY", 0.01)
    follower = IkeFollower(tmp_path / "vici", lambda _event: None)
    assert not await follower._daemon_came(0.02)
    waiting = asyncio.create_task(follower._daemon_came(3600.0))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    (tmp_path / "vici").touch()
    async with asyncio.timeout(30):
        assert await waiting
