"""Leaves the flows of other network namespaces to the instances that judge them."""

from __future__ import annotations

import asyncio
import logging

from ipsecgate.admin import loader
from ipsecgate.errors import GateError
from ipsecgate.paths import Paths

log = logging.getLogger("ipsecgate")

POLL = 2.0  # seconds between looks


class OtherInstances:
    """The instances that judge other namespaces; `names` has them by the namespace's cookie."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self.names: dict[int, str] = {}

    async def run(self) -> None:
        """Look for them until cancelled."""
        while True:
            try:
                found = await asyncio.to_thread(loader.leave_to_others, self._paths)
            except (GateError, OSError) as error:
                log.warning("cannot look for other instances: %s", error)
            else:
                for cookie in found.keys() - self.names.keys():
                    log.info("instance %s judges the flows of its namespace", found[cookie])
                for cookie in self.names.keys() - found.keys():
                    name = self.names[cookie]
                    log.info("instance %s is not attached wherever this one is", name)
                self.names = found
            await asyncio.sleep(POLL)
