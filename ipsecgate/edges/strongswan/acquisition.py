"""Negotiations that the kernel's ACQUIRE starts, because `initiate` cannot name the peer.

    our ACQUIRE  ->  charon: a new IKE_SA with this peer  ->  CHILD_SA, or an end of that IKE_SA

Rules of this module: charon answers an ACQUIRE with nothing. An event reports success; its lists
show a failure, and its log only says when to look and why it failed. Without events and log the end
is noticed late, and nothing else changes.

Source: acquire() in strongSwan's trap_manager.c: a wildcard has an IKE_SA for each peer, and a
second ACQUIRE for a peer is ignored while the first one is under way.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from ipsecgate.core.codec.causes import failure_cause, out_of_time
from ipsecgate.core.codec.vici_sections import sections, text, texts
from ipsecgate.core.model.events import IkeDown
from ipsecgate.core.model.flow import Address
from ipsecgate.core.model.ipsec import ChildName, ChildSa
from ipsecgate.core.model.problem import Cause
from ipsecgate.edges.strongswan.events import LogLine
from ipsecgate.edges.strongswan.vici import Message

LOOK_AGAIN = 1.0  # seconds until the lists are read unasked; doubled each time
LINES = 64  # of the log that are kept

_BEGUN = re.compile(r"initiating (?:\w+ Mode )?IKE_SA .*\[(\d+)\] to (\S+)")
_ENDED = re.compile(r"failed to establish CHILD_SA|establishing CHILD_SA failed|unable to resolve")


@dataclass(slots=True)
class _Attempt:
    """One negotiation; `unique` is its IKE_SA's number as soon as the log has shown it."""

    peer: Address
    look: asyncio.Event = field(default_factory=asyncio.Event)
    is_up: bool = False
    unique: int = 0
    lines: list[str] = field(default_factory=list)


class Acquisition:
    """Negotiations with peers that only an ACQUIRE names.

    `established` lists the CHILD_SAs, `list_sas` the IKE_SAs of a configuration; `drop` drops an
    IKE configuration's half-open IKE_SAs with a peer.
    """

    def __init__(
        self,
        established: Callable[[], Awaitable[Iterable[ChildSa]]],
        list_sas: Callable[[str], Awaitable[list[Message]]],
        drop: Callable[[str, Address], Awaitable[None]],
    ) -> None:
        self._established = established
        self._list_sas = list_sas
        self._drop = drop
        self._attempts: dict[ChildName, _Attempt] = {}

    async def negotiate(
        self, name: ChildName, peer: Address, acquire: Callable[[], None], limit: float
    ) -> Cause | None:
        """Send an ACQUIRE and wait `limit` seconds at most; return why it failed, None if it is up.

        Raises: IkeError, ViciError; OSError if the kernel refuses the ACQUIRE.
        """
        attempt = self._attempts[name] = _Attempt(peer)
        loop = asyncio.get_running_loop()
        deadline, pause = loop.time() + limit, LOOK_AGAIN
        try:
            acquire()
            while (left := deadline - loop.time()) > 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(pause, left)):
                        await attempt.look.wait()
                attempt.look.clear()
                pause *= 2
                if attempt.is_up or await self._is_up(name, peer):
                    return None
                if not await self._is_under_way(name.ike, peer):
                    return failure_cause(attempt.lines) or Cause("strongSwan did not negotiate")
        finally:
            del self._attempts[name]
        await self._drop(name.ike, peer)
        return out_of_time(limit)

    def on_child_up(self, sa: ChildSa) -> None:
        """Note that a CHILD_SA came up."""
        for name, attempt in self._attempts.items():
            if name.whole == sa.name and attempt.peer == sa.remote_host:
                attempt.is_up = True
                attempt.look.set()

    def on_ike_down(self, event: IkeDown) -> None:
        """Note that an IKE_SA ended."""
        for attempt in self._attempts.values():
            if attempt.unique == event.unique:
                attempt.look.set()

    def on_log(self, line: LogLine) -> None:
        """Collect the lines about the IKE_SAs that the ACQUIREs started."""
        if not self._attempts:
            return
        if begun := _BEGUN.match(line.text):
            unique, address = begun.groups()
            for name, attempt in self._attempts.items():
                if (name.ike, str(attempt.peer)) == (line.ike, address):
                    attempt.unique = int(unique)
        for attempt in self._attempts.values():
            if attempt.unique and attempt.unique == line.unique:
                attempt.lines = [*attempt.lines, line.text][-LINES:]
                if _ENDED.search(line.text):
                    attempt.look.set()

    async def _is_up(self, name: ChildName, peer: Address) -> bool:
        return any(
            sa.name == name.whole and sa.remote_host == peer for sa in await self._established()
        )

    async def _is_under_way(self, ike: str, peer: Address) -> bool:
        """Return whether an IKE_SA with the peer is half-open, or creates a CHILD_SA."""
        for message in await self._list_sas(ike):
            for _, sa in sections(message):
                tasks = {*texts(sa, "tasks-queued"), *texts(sa, "tasks-active")}
                busy = text(sa, "state") == "CONNECTING" or "CHILD_CREATE" in tasks
                if busy and text(sa, "remote-host") == str(peer):
                    return True
        return False
