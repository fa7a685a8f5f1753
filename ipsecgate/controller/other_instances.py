"""Leaves the flows of other network namespaces to the instances that judge them.

Nothing notifies of the cgroups that another instance gates. So this looks every `POLL` while there
is one. While there is none, it waits until one is loaded.
"""

from __future__ import annotations

import asyncio
import logging

from ipsecgate.admin import instances, loader
from ipsecgate.edges.host.inotify import Arrivals
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
            await self._until_due()

    async def _until_due(self) -> None:
        pins = loader.pins_of(self._paths)
        try:
            if not instances.is_beside_others(pins):
                loaded = Arrivals(pins.root.parent)
                try:
                    if not instances.is_beside_others(pins):  # it may have come before we watched
                        await _until_readable(loaded.fd)
                        return
                finally:
                    loaded.close()
        except OSError as error:
            log.debug("cannot watch for other instances: %s", error)
        await asyncio.sleep(POLL)


async def _until_readable(fd: int) -> None:
    loop, readable = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, readable.set)
    try:
        await readable.wait()
    finally:
        loop.remove_reader(fd)
