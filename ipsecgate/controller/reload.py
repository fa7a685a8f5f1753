"""Reloads the configuration: all of it or nothing, while the old one stays in force."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from ipsecgate.core.model.problem import Problem
from ipsecgate.edges.host import systemd
from ipsecgate.edges.host.config import Config
from ipsecgate.errors import GateError, UsageError

log = logging.getLogger("ipsecgate")


class Reload:
    """Reads with `read` and puts in force with `adopt`; one reload at a time.

    A configuration that is refused changes nothing; `errors` shows why until one is adopted.
    """

    def __init__(
        self, read: Callable[[], Config], adopt: Callable[[Config], Awaitable[None]]
    ) -> None:
        self._read = read
        self._adopt = adopt
        self._lock = asyncio.Lock()
        self.errors: list[Problem] = []

    async def run(self) -> Mapping[str, Any]:
        """Reload; return once the new configuration is in force. Raises: UsageError, GateError."""
        async with self._lock:
            systemd.reloading()
            try:
                config = await asyncio.to_thread(self._read)
                await self._adopt(config)
            except GateError as error:
                self.errors = [_refused(error)]
                log.error("reload refused: %s", error)
                raise
            finally:
                systemd.notify(READY=1)
            self.errors = []
            log.info("reloaded")
            return {"policies": len(config.settings.policies), "cgroups": list(config.cgroups)}

    async def run_logged(self) -> None:
        """Reload for a signal, whose sender gets no answer: only the log shows the result."""
        try:
            await self.run()
        except GateError:
            return


def _refused(error: GateError) -> Problem:
    advice = error.hint or "mend the file, then `ipsecgate reload`"
    return Problem(f"the last reload was refused, so nothing has changed: {error}", advice)


def refuse_what_needs_a_restart(file: Path, old: Config, new: Config) -> None:
    """Refuse changes to settings that are only read at the start. Raises: UsageError."""
    before = {"vici": old.vici, "sa_source": old.settings.sa_source}
    after = {"vici": new.vici, "sa_source": new.settings.sa_source}
    for key, value in after.items():
        if before[key] != value:
            raise UsageError(
                f"{file}: gate.{key}: cannot change while the controller runs",
                hint="restart the controller: this opens nothing, and covered flows go on",
            )
