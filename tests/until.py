"""Wait for a condition that other tasks of the event loop bring about."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def until(holds: Callable[[], object], pause: float = 0.001) -> None:
    """Poll until `holds()` is true. Raises: TimeoutError after 30 s."""
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(pause)
