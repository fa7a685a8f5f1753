"""Follows the kernel's IPsec databases, and compares them with a dump every `CHECK` seconds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ipsecgate.core.model import events as on
from ipsecgate.core.model.policy import SaSource
from ipsecgate.edges.kernel import probe
from ipsecgate.edges.kernel.xfrm import Overrun, XfrmMonitor

log = logging.getLogger("ipsecgate")

CHECK = 60.0  # seconds between comparisons


class XfrmFollower:
    """Follows the SPD and SAD of this network namespace; `deliver` gets their events."""

    def __init__(
        self, source: SaSource, deliver: Callable[[on.XfrmEvent | on.KernelSnapshot], None]
    ) -> None:
        self._source = source
        self._deliver = deliver
        self._monitor: XfrmMonitor | None = None

    async def run(self) -> None:
        """Follow both until cancelled; return at once if only the IKE daemon's SAs count."""
        if self._source is SaSource.VICI:
            return
        if self._source is SaSource.AUTO and not probe.has_xfrm():
            self._deliver(on.KernelSnapshot((), ()))  # a kernel without XFRM stays empty
            return
        async with XfrmMonitor(self._deliver, _log_overrun) as self._monitor:
            await self._monitor.run()

    def read_now(self) -> None:
        """Deliver the notifications that have arrived so far."""
        if self._monitor is not None:
            self._monitor.drain()

    async def check(self, also: Callable[[], None]) -> None:
        """Have the databases compared regularly, and call `also` each time, until cancelled."""
        while True:
            await asyncio.sleep(CHECK)
            if self._monitor is not None:
                await self._monitor.resync(check=True)
            also()


def _log_overrun(overrun: Overrun) -> None:
    log.warning("XFRM notifications were lost (%s): reading the SPD and SAD again", overrun.cause)
