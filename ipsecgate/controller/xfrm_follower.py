"""The kernel's IPsec databases, followed and, every so often, compared. No decisions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from ipsecgate.core.model import events as on
from ipsecgate.core.model.policy import SaSource
from ipsecgate.edges.kernel import probe
from ipsecgate.edges.kernel.xfrm import Overrun, XfrmMonitor

log = logging.getLogger("ipsecgate")

CHECK = 60.0  # seconds between comparisons of what is known with what is


class XfrmFollower:
    """SPD and SAD of this network namespace; `deliver` gets what they tell."""

    def __init__(
        self, source: SaSource, deliver: Callable[[on.XfrmEvent | on.KernelSnapshot], None]
    ) -> None:
        self._source = source
        self._deliver = deliver
        self._monitor: XfrmMonitor | None = None

    async def run(self) -> None:
        """Follow them until cancelled; end at once where there is nothing to follow."""
        if self._source is SaSource.VICI:
            return
        if self._source is SaSource.AUTO and not probe.has_xfrm():
            self._deliver(on.KernelSnapshot((), ()))  # nor will there ever be anything
            return
        async with XfrmMonitor(self._deliver, _tell) as self._monitor:
            await self._monitor.run()

    def look(self) -> None:
        """Deliver at once what they have told so far."""
        if self._monitor is not None:
            self._monitor.look()

    async def check(self, also: Callable[[], None]) -> None:
        """Have what is known compared with what is, until cancelled; then do `also`."""
        while True:
            await asyncio.sleep(CHECK)
            if self._monitor is not None:
                await self._monitor.resync(check=True)
            also()


def _tell(overrun: Overrun) -> None:
    log.warning("XFRM notifications were lost (%s): reading the SPD and SAD again", overrun.cause)
