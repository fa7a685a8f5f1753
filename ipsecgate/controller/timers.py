"""The gate's timers, on the event loop's clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ipsecgate.core.gate import commands as do
from ipsecgate.core.model import events as on


class Timers:
    """The running timers; `deliver` gets an event when one fires."""

    def __init__(self, deliver: Callable[[on.TimerFired], None]) -> None:
        self._deliver = deliver
        self._running: dict[on.Timer, asyncio.TimerHandle] = {}

    def __len__(self) -> int:
        return len(self._running)

    def execute(self, command: do.StartTimer | do.StopTimer) -> None:
        """Stop the timer if it runs; start it again for `StartTimer`."""
        running = self._running.pop(command.timer, None)
        if running is not None:
            running.cancel()
        if isinstance(command, do.StartTimer):
            self._running[command.timer] = asyncio.get_running_loop().call_later(
                command.seconds, self._fire, command.timer
            )

    def _fire(self, timer: on.Timer) -> None:
        del self._running[timer]
        self._deliver(on.TimerFired(timer))
