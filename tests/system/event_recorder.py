"""Record the events of an `XfrmMonitor`, for tests to read."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from ipsecgate.core.model.events import PolicySet, SaSet
from ipsecgate.edges.kernel.xfrm import Overrun, XfrmMonitor
from tests.until import until


def ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)


def batch(commands: list[str]) -> None:
    subprocess.run(["ip", "-batch", "-"], input="\n".join(commands), text=True, check=True)


class EventRecorder:
    """The events of a monitor, with their arrival times."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.overruns: list[Overrun] = []
        self.arrived: list[float] = []

    def deliver(self, event: Any) -> None:
        self.arrived.append(time.perf_counter())
        # Ignore numbers that the kernel chooses.
        match event:
            case PolicySet(entry):
                event = PolicySet(replace(entry, index=0))
            case SaSet(sa):
                event = SaSet(replace(sa, installed_at=0))
        self.events.append(event)

    async def next(self, count: int = 1) -> list[Any]:
        """Wait for `count` events, remove and return them."""
        await until(lambda: len(self.events) >= count)
        found, self.events = self.events[:count], self.events[count:]
        return found


@contextlib.asynccontextmanager
async def following(**options: Any) -> AsyncIterator[tuple[XfrmMonitor, EventRecorder]]:
    recorder = EventRecorder()
    async with XfrmMonitor(recorder.deliver, recorder.overruns.append, **options) as monitor:
        run = asyncio.create_task(monitor.run())
        await until(lambda: recorder.events)
        try:
            yield monitor, recorder
        finally:
            run.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await run
