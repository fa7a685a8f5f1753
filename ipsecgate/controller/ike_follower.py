"""Follows the IKE daemon over VICI, from one connection to the next, and delivers its events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import assert_never

from ipsecgate.core.codec.vici_sections import ViciError
from ipsecgate.core.gate import commands as do
from ipsecgate.core.model import events as on
from ipsecgate.edges.strongswan.client import IkeClient
from ipsecgate.edges.strongswan.vici import IkeError, IkeUnreachableError

log = logging.getLogger("ipsecgate")

POLL = 2.0  # seconds between polls of the loaded connections: VICI has no event for them
# Seconds between polls that the gate asked for; doubled after each one that showed nothing new.
PAUSE = 0.05
PAUSE_LAST = 0.5
RETRY = 0.5  # seconds until the daemon is tried again
CONNECT = 5.0  # seconds that the daemon may take for its first answer


class IkeFollower:
    """Follows the daemon behind a VICI socket; `deliver` gets its events."""

    def __init__(self, vici: Path, deliver: Callable[[on.Event], None]) -> None:
        self._vici = vici
        self._deliver = deliver
        self._client: IkeClient | None = None
        self._poll_due = asyncio.Event()
        self._last_error = ""

    def poll_now(self) -> None:
        """List the loaded and established children without waiting for the next poll."""
        self._poll_due.set()

    async def execute(self, command: do.IkeCommand) -> None:
        """Carry out a command; ignored without a connection, when `IkeGone` is on its way."""
        if self._client is None:
            return
        match command:
            case do.AskIke():
                self.poll_now()
            case do.Initiate():
                await self._client.initiate(command.name, command.limit)
            case do.Terminate():
                self._client.terminate_soon(command.name, command.unique)
            case _:
                assert_never(command)

    async def run(self) -> None:
        """Follow the daemon until cancelled."""
        while True:
            try:
                async with asyncio.timeout(CONNECT):
                    client = await IkeClient.connect(self._vici)
                await self._follow(client)
            except TimeoutError:
                self._deliver(on.IkeGone(f"no answer within {CONNECT:.0f} s"))
            except IkeError as error:
                self._deliver(on.IkeGone(str(error)))
            await asyncio.sleep(RETRY)

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
            # A caller may keep asking for a flow that no connection protects. The gate polls again
            # each time, so back off.
            pause = PAUSE if listed != before else min(2 * pause, PAUSE_LAST)
            try:
                async with asyncio.timeout(POLL):
                    await self._poll_due.wait()
            except TimeoutError:
                pause = PAUSE
            await asyncio.sleep(pause)
