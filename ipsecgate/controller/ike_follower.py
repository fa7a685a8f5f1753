"""Follows the IKE daemon over VICI, from one connection to the next, and delivers its events.

What it has loaded and established is listed every `POLL` seconds, but only while something happens:
if nobody reports anything (`stir`), nothing has changed that a list would show.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import assert_never

from ipsecgate.core.codec.vici_sections import ViciError
from ipsecgate.core.gate import commands as do
from ipsecgate.core.model import events as on
from ipsecgate.core.model.problem import Problem
from ipsecgate.edges.host import inotify
from ipsecgate.edges.kernel import acquire
from ipsecgate.edges.strongswan.client import IkeClient
from ipsecgate.edges.strongswan.vici import IkeError, IkeUnreachableError, no_answer

log = logging.getLogger("ipsecgate")

POLL = 2.0  # seconds between polls
# Seconds between polls that the gate asked for; doubled after each one that showed nothing new.
PAUSE = 0.05
PAUSE_LAST = 0.5
# Seconds until the daemon is tried again; doubled until its socket appears.
RETRY = 0.5
RETRY_LAST = 64.0
RETRY_BLIND = 4.0  # the longest such pause if its folder cannot be watched
LOADING = 0.5  # seconds within which a connection is loaded that charon has logged
CONNECT = 5.0  # seconds that the daemon may take for its first answer


class IkeFollower:
    """Follows the daemon behind a VICI socket; `deliver` gets its events."""

    def __init__(self, vici: Path, deliver: Callable[[on.Event], None]) -> None:
        self._vici = vici
        self._deliver = deliver
        self._client: IkeClient | None = None
        self._poll_due = asyncio.Event()
        self._stirred = asyncio.Event()  # something has happened since the last poll
        self._last_error = ""

    def stir(self) -> None:
        """Note that something has happened, so that the next poll is made in `POLL` seconds."""
        self._stirred.set()

    def poll_now(self) -> None:
        """List the loaded and established children without waiting for the next poll."""
        self._poll_due.set()
        self._stirred.set()

    def _on_load(self) -> None:
        self.poll_now()
        asyncio.get_running_loop().call_later(LOADING, self.poll_now)

    async def execute(self, command: do.IkeCommand) -> None:
        """Carry out a command; ignored without a connection, when `IkeGone` is on its way."""
        if self._client is None:
            return
        match command:
            case do.AskIke():
                self.poll_now()
            case do.Initiate():
                await self._initiate(self._client, command)
            case do.Terminate():
                self._client.terminate_soon(command.name, command.unique)
            case _:
                assert_never(command)

    async def _initiate(self, client: IkeClient, command: do.Initiate) -> None:
        wanted = command.acquire
        if wanted is None:
            await client.initiate(command.name, command.limit)
        else:
            peer, send = wanted.flow.daddr, partial(acquire.send, wanted)
            await client.acquire(command.name, peer, send, command.limit)

    async def run(self) -> None:
        """Follow the daemon until cancelled."""
        pause = RETRY
        while True:
            try:
                async with asyncio.timeout(CONNECT):
                    client = await IkeClient.connect(self._vici, self._on_load)
                pause = RETRY
                await self._follow(client)
            except TimeoutError:
                self._deliver(_gone(no_answer(self._vici, CONNECT)))
            except IkeError as error:
                self._deliver(_gone(error))
            pause = RETRY if await self._daemon_came(pause) else min(2 * pause, RETRY_LAST)

    async def _daemon_came(self, limit: float) -> bool:
        """Wait so many seconds at most; return whether a socket may have appeared meanwhile."""
        loop, came = asyncio.get_running_loop(), asyncio.Event()
        try:
            arrivals = inotify.Arrivals(self._vici.parent)
        except OSError:
            await asyncio.sleep(min(limit, RETRY_BLIND))
            return False

        def on_arrival() -> None:
            loop.remove_reader(arrivals.fd)  # nobody reads it, so it stays readable
            came.set()

        loop.add_reader(arrivals.fd, on_arrival)
        try:
            # It may have come before we watched; and it listens a moment after it appears.
            await asyncio.sleep(min(limit, RETRY))
            async with asyncio.timeout(limit - RETRY):
                await came.wait()
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(arrivals.fd)
            arrivals.close()
        return True

    async def _follow(self, client: IkeClient) -> None:
        """Follow one connection until it breaks."""
        async with client, asyncio.TaskGroup() as tasks:
            poll = tasks.create_task(self._poll(client))
            self._client = client
            async for event in client.events():
                self._deliver(event)
            self._client = None
            poll.cancel()

    async def _poll(self, client: IkeClient) -> None:
        userspace_esp: bool | None = None  # a daemon keeps its plugins as long as it lives
        listed: on.IkeConnected | None = None
        pause = PAUSE
        while True:
            self._poll_due.clear()
            self._stirred.clear()
            began = time.monotonic()
            try:
                if userspace_esp is None:
                    userspace_esp = await client.does_userspace_esp()
                children = await client.children()
                established = await client.established()
            except IkeUnreachableError:
                return  # the event connection breaks, too, and `run` delivers IkeGone
            except (IkeError, ViciError) as error:
                # The last list stays in force. Log each error once.
                if str(error) != self._last_error:
                    log.error("cannot read strongSwan's connections: %s", error)
                self._last_error = str(error)
                await asyncio.sleep(POLL)
                continue
            self._last_error = ""
            before, pid = listed, client.daemon_pid
            listed = on.IkeConnected(children, established, pid, userspace_esp, client.unread)
            self._deliver(listed)
            took = time.monotonic() - began
            # A caller may keep asking for a flow that no connection protects. The gate polls again
            # each time, so back off.
            pause = PAUSE if listed != before else min(2 * pause, PAUSE_LAST)
            try:
                async with asyncio.timeout(POLL):
                    await self._poll_due.wait()
            except TimeoutError:
                pause = PAUSE
                if client.reports_loads and not userspace_esp:
                    await self._stirred.wait()
            await asyncio.sleep(max(pause, took))  # thousands of connections take the daemon long


def _gone(error: IkeError) -> on.IkeGone:
    return on.IkeGone(Problem.of(error))
