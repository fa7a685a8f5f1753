"""Takes over from a predecessor: until the SPD table is ours, only its entries say what is open.

Reading the kernel's databases, and asking IKE, may take seconds, and longer if IKE does not answer.
Flows whose SAs are gone must not stay open so long. Each live entry names its SA, so those are
closed that the first dump does not have, or that the kernel reports gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Container, Set

from ipsecgate.core.model import events as on
from ipsecgate.core.state.spd import sa_tag
from ipsecgate.edges.bpf.parts import let_others_run, parts_of
from ipsecgate.edges.bpf.tables import Tables


class Takeover:
    """Closes flows whose SAs are gone, until `end`."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._gone: set[int] = set()
        self._dump: on.KernelSnapshot | None = None
        self._woken = asyncio.Event()
        self._has_ended = False

    def put(self, event: on.XfrmEvent | on.KernelSnapshot) -> None:
        """Take notice of what the kernel reports."""
        if self._has_ended:
            return
        if isinstance(event, on.SaGone):
            self._gone.add(sa_tag(event.id))
            self._woken.set()
        elif isinstance(event, on.KernelSnapshot):
            self._dump = event
            self._woken.set()

    def end(self) -> None:
        """The gate has published the SPD table: from now on it closes what must be closed."""
        self._has_ended = True
        self._woken.set()

    async def run(self) -> None:
        """Close flows until the end. Raises: OSError."""
        while not self._has_ended:
            await self._woken.wait()
            self._woken.clear()
            gone, self._gone = self._gone, set()
            if gone:
                await self._tables.close_tagged(gone)
            elif self._dump is not None:
                dump, self._dump = self._dump, None
                self._woken.set()  # for what was reported meanwhile
                await self._close_others(dump)

    async def _close_others(self, dump: on.KernelSnapshot) -> None:
        there: set[int] = set()
        for some in parts_of(dump.sas):
            # A larval state has the SPI that the policy names: that of an SA that went, perhaps.
            there |= {sa_tag(sa.id) for sa in some if not sa.larval}
            await let_others_run()
        if not self._has_ended:
            await self._tables.close_tagged(_Others(there))


class _Others(Container[int]):
    """Every tag but these."""

    def __init__(self, tags: Set[int]) -> None:
        self._tags = tags

    def __contains__(self, tag: object) -> bool:
        return tag != 0 and tag not in self._tags
