"""The IKE daemon, followed from one connection to the next: its news as events. No decisions."""

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

POLL = 2.0  # seconds between looks at the loaded connections: VICI has no event for them
PAUSE = 0.05  # at least, however often somebody asks for a look; twice that after each in vain,
PAUSE_LAST = 0.5  # up to this
RETRY = 0.5  # seconds until the daemon is tried again
CONNECT = 5.0  # seconds it has to answer at first


class IkeFollower:
    """The daemon on a VICI socket, there or not; `deliver` gets what it tells."""

    def __init__(self, vici: Path, deliver: Callable[[on.Event], None]) -> None:
        self._vici = vici
        self._deliver = deliver
        self._client: IkeClient | None = None
        self._news = asyncio.Event()
        self._trouble = ""

    def look(self) -> None:
        """Look at once what it has loaded and established."""
        self._news.set()

    async def execute(self, command: do.IkeCommand) -> None:
        """Carry a command out, if the daemon is there."""
        if self._client is None:
            return  # IkeGone is told already
        match command:
            case do.AskIke():
                self.look()
            case do.Initiate():
                await self._client.initiate(command.name, command.limit)
            case do.Terminate():
                self._client.terminate_soon(command.name, command.unique)
            case _:
                assert_never(command)

    async def run(self) -> None:
        """Follow it until cancelled."""
        while True:
            try:
                async with asyncio.timeout(CONNECT):
                    client = await IkeClient.connect(self._vici)
                await self._with(client)
            except TimeoutError:
                self._deliver(on.IkeGone(f"no answer within {CONNECT:.0f} s"))
            except IkeError as error:
                self._deliver(on.IkeGone(str(error)))
            await asyncio.sleep(RETRY)

    async def _with(self, client: IkeClient) -> None:
        """Follow one connection until it breaks."""
        async with client, asyncio.TaskGroup() as tasks:
            poll = tasks.create_task(self._poll(client))
            self._client = client
            async for event in client.events():
                self._deliver(event)
            self._client = None
            poll.cancel()

    async def _poll(self, client: IkeClient) -> None:
        userland: bool | None = None  # a daemon keeps its plugins as long as it lives
        told: on.IkeConnected | None = None
        pause = PAUSE
        while True:
            self._news.clear()
            try:
                if userland is None:
                    userland = await client.does_userspace_esp()
                children = await client.children()
                established = await client.established()
            except IkeUnreachableError:
                return  # IkeGone says so
            except (IkeError, ViciError) as error:
                # What was known stays in force; a connection that cannot be read is told.
                if str(error) != self._trouble:
                    log.error("cannot read strongSwan's connections: %s", error)
                self._trouble = str(error)
                await asyncio.sleep(POLL)
                continue
            self._trouble = ""
            before, pid = told, client.daemon_pid
            told = on.IkeConnected(children, established, pid, userland, client.unread)
            self._deliver(told)
            # Who asks for what no connection protects has it looked at again and again.
            pause = PAUSE if told != before else min(2 * pause, PAUSE_LAST)
            try:
                async with asyncio.timeout(POLL):
                    await self._news.wait()
            except TimeoutError:
                pause = PAUSE
            await asyncio.sleep(pause)
