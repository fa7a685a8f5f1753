"""Precedence: real-time priority only while calls are answered. The scheduler is faked."""

from __future__ import annotations

import asyncio
import os

import pytest

from ipsecgate.edges.holding.precedence import Precedence


@pytest.fixture
def policies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The scheduling policies that were set, without the flag that each must have."""
    found: list[int] = []

    def set_scheduler(pid: int, policy: int, _param: os.sched_param) -> None:
        assert pid == 0
        assert policy & os.SCHED_RESET_ON_FORK, "no child may inherit it"
        found.append(policy & ~os.SCHED_RESET_ON_FORK)

    monkeypatch.setattr(os, "sched_setscheduler", set_scheduler)
    return found


async def test_it_lasts_until_a_turn_without_an_answer(policies: list[int]) -> None:
    precedence = Precedence()
    for _turn in range(3):
        for _answer in range(5):
            precedence.take()
        await asyncio.sleep(0)
    assert policies == [os.SCHED_FIFO], "also between two turns with answers"
    await asyncio.sleep(0)
    assert policies == [os.SCHED_FIFO, os.SCHED_OTHER]
    await asyncio.sleep(0)
    precedence.take()
    assert policies == [os.SCHED_FIFO, os.SCHED_OTHER, os.SCHED_FIFO]


async def test_without_the_right_to_it_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def refuse(*_args: object) -> None:
        tries.append(1)
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    precedence = Precedence()
    for _turn in range(3):
        precedence.take()
        await asyncio.sleep(0)
    assert len(tries) == 1, "it asks once"
