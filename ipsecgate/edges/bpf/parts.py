"""Work in parts: what takes time in proportion to the tables lets other tasks run in between."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

ENTRIES_PER_PART = 256  # written in one go: two milliseconds

Pause = Callable[[], Awaitable[None]]
"""Awaited between two parts."""
T = TypeVar("T")


async def let_others_run() -> None:
    """Let the other tasks of the loop have a turn."""
    await asyncio.sleep(0)


async def drop(items: set[T], pause: Pause = let_others_run) -> None:
    """Empty a set: to free a million objects in one go takes a tenth of a second."""
    while items:
        for _ in range(min(ENTRIES_PER_PART, len(items))):
            items.pop()
        if items:
            await pause()


def parts_of(items: Iterable[T]) -> Iterator[list[T]]:
    """Yield items as lists of `ENTRIES_PER_PART`."""
    iterator = iter(items)
    while some := list(islice(iterator, ENTRIES_PER_PART)):
        yield some
