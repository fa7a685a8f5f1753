"""The controller as a service: what systemd is told, and what ends the process.

Rules of this module: systemd hears that we live from whoever decides, between two
decisions, so a loop that is stuck is killed. A defect anywhere ends the process;
the hooks keep refusing, and systemd starts a successor.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ipsecgate.edges.host import systemd

log = logging.getLogger("ipsecgate")

PULSE = 5.0  # seconds between looks at what is to be retried, where no watchdog wants more


class Service:
    """Talks to the service manager for one controller, and watches over its loop."""

    def __init__(self) -> None:
        watchdog = systemd.watchdog()
        self.pulse = PULSE if watchdog is None else min(PULSE, watchdog / 2)
        self._loop = asyncio.get_running_loop()
        self._failure: asyncio.Future[None] = self._loop.create_future()
        self._due = self._loop.time()
        self._status = ""
        self._loop.set_exception_handler(self._on_defect)

    def ready(self) -> None:
        """Say that what must be refused is, and that IPsec is followed."""
        systemd.notify(READY=1)

    def alive(self) -> bool:
        """Say that decisions are being made, if it is time to. True: it was."""
        now = self._loop.time()
        if now < self._due:
            return False
        self._due = now + self.pulse
        systemd.notify(WATCHDOG=1)
        return True

    def tell(self, status: str) -> None:
        """Say how it goes, in one line, if that is news."""
        if status != self._status:
            self._status = status
            systemd.notify(STATUS=status)

    def stopping(self) -> None:
        """Say that the end was asked for."""
        systemd.notify(STOPPING=1, STATUS="stopped: uncovered flows stay refused")

    async def watch(self) -> None:
        """Wait for a defect that no task tells of. Raises: whatever it was."""
        await self._failure

    def _on_defect(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Take what asyncio would only log: exceptions in callbacks and in forgotten tasks."""
        error = context.get("exception")
        if error is None:
            log.warning("%s", context.get("message"))
            return
        loop.default_exception_handler(context)
        if not self._failure.done():
            self._failure.set_exception(error)
