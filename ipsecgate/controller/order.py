"""Keeps the hooks the last of all programs that may change a call's destination, where it can.

Nothing notifies of a program that another tool attaches. So this looks at the start, every
`PERIOD`, and when the backstop has blocked a packet that no hook had refused.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from ipsecgate.admin import loader
from ipsecgate.core.model.problem import Problem
from ipsecgate.errors import GateError
from ipsecgate.paths import Paths

log = logging.getLogger("ipsecgate")

PERIOD = 60.0  # seconds
PAUSE = 2.0  # seconds, at least, between two looks


class Order:
    """The order of programs in the gated cgroups of an instance."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._due = asyncio.Event()
        self.errors: list[Problem] = []

    def suspect(self) -> None:
        """Look soon: a packet was blocked."""
        self._due.set()

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            self._due.clear()
            try:
                found = await asyncio.to_thread(loader.run_last, self._paths)
            except (GateError, OSError) as error:
                log.warning("cannot look at the programs of other tools: %s", error)
                found = []
            errors = sorted({one.problem for one in found}, key=str)
            for problem in errors:
                if problem not in self.errors:
                    log.warning("%s", problem)
            self.errors = errors
            await asyncio.sleep(PAUSE)
            with suppress(TimeoutError):
                async with asyncio.timeout(PERIOD):
                    await self._due.wait()
