"""Takes over from a predecessor: until the SPD table is ours, only its entries say what is open.

Reading the kernel's databases, and asking IKE, may take seconds, and longer if IKE does not answer.
Flows whose SAs are gone must not stay open so long. Each live entry names its SA, so those are
closed that the first dump does not have, or that the kernel reports gone, unless another SA is in
its place: a rekeying may end while nobody watches.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Container, Set

from ipsecgate.core.model import events as on
from ipsecgate.core.model.ipsec import Sa, SaId
from ipsecgate.core.state.spd import sa_tag
from ipsecgate.core.state.successors import protected_again
from ipsecgate.core.tables.layout import Entry
from ipsecgate.core.tables.table import Ternary
from ipsecgate.edges.bpf.parts import let_others_run, parts_of
from ipsecgate.edges.bpf.tables import Tables

FLUSHED = (on.PoliciesFlushed, on.SasFlushed)
SEARCHED = 4096  # policies; among more, the search would keep flows open for longer than 20 ms


class Takeover:
    """Closes flows whose SAs are gone, until `end`."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._gone: set[int] = set()
        self._kept: set[int] = set()  # tags of SAs that are gone, and have a successor
        self._dump: on.KernelSnapshot | None = None
        self._is_new = False  # whether no flow was closed because of the dump
        self._since: list[on.XfrmEvent] = []  # after the dump
        self._woken = asyncio.Event()
        self._has_ended = False

    def put(self, event: on.XfrmEvent | on.KernelSnapshot) -> None:
        """Take notice of what the kernel reports."""
        if self._has_ended:
            return
        if isinstance(event, on.KernelSnapshot):
            self._dump, self._is_new, self._since = event, True, []
            self._woken.set()
            return
        self._since.append(event)
        if isinstance(event, on.SaGone):
            self._gone.add(sa_tag(event.id))
            self._woken.set()

    def end(self) -> None:
        """The gate has published the SPD table: from now on it closes what must be closed."""
        self._has_ended = True
        self._dump, self._since = None, []
        self._woken.set()

    async def run(self) -> None:
        """Close flows until the end. Raises: OSError."""
        while not self._has_ended:
            await self._woken.wait()
            self._woken.clear()
            gone, self._gone = self._gone, set()
            if gone:
                await self._close(gone | self._kept)
            elif self._dump is not None and self._is_new:
                self._is_new = False
                self._woken.set()  # for what was reported meanwhile
                await self._close_others(self._dump)

    async def _close_others(self, dump: on.KernelSnapshot) -> None:
        there: set[int] = set()
        for some in parts_of(dump.sas):
            # A larval state has the SPI that the policy names: that of an SA that went, perhaps.
            there |= {sa_tag(sa.id) for sa in some if not sa.larval}
            await let_others_run()
        if not self._has_ended:
            await self._close(_Others(there))

    async def _close(self, tags: Container[int]) -> None:
        kept: set[Ternary] = set()
        if self._dump is not None and len(self._dump.policies) <= SEARCHED:
            entries = await self._tables.tagged(tags)
            kept = await self._protected_again(entries) if entries else set()
            self._kept.update(entries[match].id for match in kept)
        if not self._has_ended:
            await self._tables.close_tagged(tags, kept)

    async def _protected_again(self, entries: dict[Ternary, Entry]) -> set[Ternary]:
        """Return those regions whose policy has an SA again."""
        if any(isinstance(one, FLUSHED) for one in self._since):
            return set()
        sas = await self._sas()
        without = {one.key for one in self._since if isinstance(one, on.PolicyGone)}
        found: set[Ternary] = set()
        for some in parts_of(self._dump.policies if self._dump else ()):
            there = [one for one in some if not without or one.key not in without]
            found |= protected_again(entries, there, lambda reqid: sas[reqid].values())
            await let_others_run()
        return found

    async def _sas(self) -> dict[int, dict[SaId, Sa]]:
        """Return the SAs that are there, by reqid."""
        found: dict[int, dict[SaId, Sa]] = defaultdict(dict)
        for some in parts_of(self._dump.sas if self._dump else ()):
            for sa in some:
                found[sa.reqid][sa.id] = sa
            await let_others_run()
        for event in self._since:
            if isinstance(event, on.SaSet):
                found[event.sa.reqid][event.sa.id] = event.sa
        gone = {event.id for event in self._since if isinstance(event, on.SaGone)}
        for its in found.values():
            for one in gone & its.keys():
                del its[one]
        return found


class _Others(Container[int]):
    """Every tag but these."""

    def __init__(self, tags: Set[int]) -> None:
        self._tags = tags

    def __contains__(self, tag: object) -> bool:
        return tag != 0 and tag not in self._tags
