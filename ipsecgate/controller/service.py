"""The controller as a service: reports to systemd, and defects that end the process.

Rules of this module: the watchdog is fed by the task that decides, between two decisions, so
systemd kills a loop that hangs. A defect in any task or callback ends the process; the hooks go on
refusing, and systemd starts another controller.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from ipsecgate.core.model.pulse import PULSE, until_pulse
from ipsecgate.edges.host import systemd

log = logging.getLogger("ipsecgate")


class Service:
    """Reports to the service manager, runs background tasks, and watches for defects."""

    def __init__(self) -> None:
        watchdog = systemd.watchdog()
        self.pulse = PULSE if watchdog is None else min(PULSE, watchdog / 2)
        self._loop = asyncio.get_running_loop()
        self._failure: asyncio.Future[None] = self._loop.create_future()
        self._background: set[asyncio.Task[None]] = set()
        self._due = self._loop.time()
        self._status = ""
        self._loop.set_exception_handler(self._on_defect)

    def ready(self) -> None:
        """Report that the hooks refuse unprotected flows and IPsec is followed."""
        systemd.notify(READY=1)

    def alive(self) -> bool:
        """Feed the watchdog if a pulse has passed; return whether one has."""
        now = self._loop.time()
        if now < self._due:
            return False
        self._due = now + self.until_pulse()
        systemd.notify(WATCHDOG=1)
        return True

    def until_pulse(self) -> float:
        """Return the seconds until the next pulse."""
        return until_pulse(self._loop.time(), self.pulse)

    def report(self, status: str) -> None:
        """Report the state in one line, if it has changed."""
        if status != self._status:
            self._status = status
            systemd.notify(STATUS=status)

    def stopping(self) -> None:
        """Report that the controller was asked to stop."""
        systemd.notify(STOPPING=1, STATUS="stopped: uncovered flows stay refused")

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something slow in the background, so that it does not delay decisions."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled():
            task.result()  # raises in a callback, hence a defect

    async def watch(self) -> None:
        """Wait for a defect outside the main tasks. Raises: its exception."""
        await self._failure

    def _on_defect(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Handle what asyncio would only log: exceptions in callbacks and background tasks."""
        error = context.get("exception")
        if error is None:
            log.warning("%s", context.get("message"))
            return
        loop.default_exception_handler(context)
        if not self._failure.done():
            self._failure.set_exception(error)
