"""Waiting for a condition."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


async def until(condition: Callable[[], object], pause: float = 0.001) -> None:
    """Wait until the condition holds. Raises: TimeoutError after 30 s."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(pause)


def wait_until(condition: Callable[[], object], failure: str, timeout: float = 60.0) -> None:
    """Wait until the condition holds. Raises: AssertionError with `failure` after `timeout` s."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, failure
        time.sleep(0.01)
