"""Waiting for what a loop's other tasks bring about."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def until(holds: Callable[[], object], pause: float = 0.001) -> None:
    """Wait until something holds. Raises: TimeoutError after 30 s."""
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(pause)
