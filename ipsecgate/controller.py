"""The shell around the core: descriptors become events, commands are carried out.

    ring, XFRM, VICI, routes, timers --events--> Gate.step --commands--> maps, VICI, timers

Rules of this module: no decisions. One queue, one consumer, so events are taken
in one after the other. Whatever it cannot do ends the process; the hooks stay
and keep refusing what no SA covers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from contextlib import suppress
from typing import Any

from ipsecgate import loader, report
from ipsecgate.core import commands as do
from ipsecgate.core import events as on
from ipsecgate.core.gate import Gate
from ipsecgate.core.layout import Setting, TableId
from ipsecgate.core.table import EMPTY
from ipsecgate.edges import cgroups, control, memory, systemd
from ipsecgate.edges.config import Config
from ipsecgate.edges.datapath import Datapath
from ipsecgate.edges.ike import IkeClient
from ipsecgate.edges.routes import Routes
from ipsecgate.edges.vici import IkeError
from ipsecgate.edges.xfrm import XfrmMonitor
from ipsecgate.errors import GateError
from ipsecgate.lock import held
from ipsecgate.paths import Paths

log = logging.getLogger("ipsecgate")

IKE_POLL = 2.0  # seconds between looks at the loaded connections: VICI has no event for them
IKE_RETRY = 0.5  # seconds until the daemon is tried again


async def run(paths: Paths, config: Config) -> None:
    """Run one instance's controller until SIGTERM or SIGINT.

    Raises: GateError for what the operator can mend.
    """
    busy = f"a controller of instance {paths.instance!r} is running"
    with held(paths.run_instance / "controller.lock", wait=False, busy=busy):
        loader.load(paths)
        targets = [str(cgroups.root())] if config.host else config.cgroups
        for target in targets:
            log.info("gated: %s", loader.attach(paths, target))
        await Controller(paths, config).run()


class Controller:
    """One instance's edges, and the gate between them."""

    def __init__(self, paths: Paths, config: Config) -> None:
        self._paths = paths
        self._config = config
        self._gate = Gate(config.settings, memory.recall(paths.remembered))
        self._data = Datapath(loader.pins_of(paths))
        self._queue: asyncio.Queue[on.Event] = asyncio.Queue()
        self._timers: dict[on.Timer, asyncio.TimerHandle] = {}
        self._ike: IkeClient | None = None
        self._ike_news = asyncio.Event()
        self._routes = Routes(self._queue.put_nowait)
        self._since = time.time()
        self._ready = False

    async def run(self) -> None:
        """Follow everything until told to end."""
        loop = asyncio.get_running_loop()
        self._data.set(Setting.AUDIT, int(self._config.settings.audit))
        self._data.set(Setting.DENY, int(self._config.settings.deny))
        self._data.set(Setting.ERROR, self._config.settings.errnos.uncovered)
        ring = self._data.open_ring(self._queue.put_nowait)
        loop.add_reader(ring, self._data.drain)
        try:
            async with (
                control.serving(self._paths.control, {"status": self._status}),
                XfrmMonitor(self._on_kernel, self._on_overrun) as kernel,
                asyncio.TaskGroup() as tasks,
            ):
                work = [
                    tasks.create_task(self._decide()),
                    tasks.create_task(kernel.run()),
                    tasks.create_task(self._routes.run()),
                    tasks.create_task(self._follow_ike()),
                ]
                for number in (signal.SIGTERM, signal.SIGINT):
                    loop.add_signal_handler(number, lambda: [task.cancel() for task in work])
        except* GateError as group:
            raise group.exceptions[0] from None
        finally:
            loop.remove_reader(ring)
            self._data.close()

    # --- events in ------------------------------------------------------------------

    def _on_kernel(self, event: on.XfrmEvent | on.KernelSnapshot) -> None:
        self._queue.put_nowait(event)
        if isinstance(event, on.KernelSnapshot):
            self._ike_news.set()  # which of these SAs does the daemon vouch for?

    def _on_overrun(self, overrun: Any) -> None:
        log.warning("XFRM notifications lost (%s): reading SPD and SAD anew", overrun.cause)

    async def _decide(self) -> None:
        for command in self._gate.start():
            await self._execute(command)
        while True:
            events = [await self._queue.get()]
            while not self._queue.empty():
                events.append(self._queue.get_nowait())
            for command in self._gate.step(*events):
                await self._execute(command)
            self._tell_ready()

    def _tell_ready(self) -> None:
        # The SPD table comes last: it waits until both the kernel and IKE were heard.
        if not self._ready and TableId.SPD in self._gate.published:
            self._ready = True
            systemd.notify("READY=1\nSTATUS=policies and SAs published")
            log.info("ready")

    async def _follow_ike(self) -> None:
        while True:
            try:
                await self._with_ike(await IkeClient.connect(self._config.vici))
            except IkeError as error:
                self._queue.put_nowait(on.IkeGone(str(error)))
            await asyncio.sleep(IKE_RETRY)

    async def _with_ike(self, client: IkeClient) -> None:
        """Follow one connection until it breaks."""
        async with client, asyncio.TaskGroup() as tasks:
            poll = tasks.create_task(self._poll_ike(client))
            self._ike = client
            async for event in client.events():
                self._queue.put_nowait(event)
            self._ike = None
            poll.cancel()

    async def _poll_ike(self, client: IkeClient) -> None:
        while True:
            self._ike_news.clear()
            try:
                children = await client.children()
                established = await client.established()
            except IkeError:
                return  # the connection broke, or is about to say so
            self._queue.put_nowait(on.IkeConnected(children, established, client.daemon_pid))
            with suppress(TimeoutError):
                await asyncio.wait_for(self._ike_news.wait(), IKE_POLL)

    # --- commands out -----------------------------------------------------------------

    async def _execute(self, command: do.Command) -> None:
        match command:
            case do.SetEntry():
                self._data.set_entry(command.table, command.index, command.key, command.entry)
            case do.Publish():
                await self._publish(command)
            case do.SetSources():
                self._data.set_sources(command.sources)
            case do.ResolveSources():
                self._routes.follow(command.destinations)
            case do.ExemptIke():
                self._data.set(Setting.IKE, command.pid)
            case do.StartTimer() | do.StopTimer():
                self._set_timer(command)
            case do.AskIke() | do.Initiate() | do.Terminate():
                await self._tell_ike(command)
            case do.Remember():
                memory.keep(self._paths.remembered, command.children)
            case do.Log():
                log.log(logging.getLevelName(command.level.upper()), "%s", command.text)
            case _:
                raise NotImplementedError(command)

    async def _tell_ike(self, command: do.AskIke | do.Initiate | do.Terminate) -> None:
        if self._ike is None:
            return  # IkeGone is in the queue already
        match command:
            case do.AskIke():
                self._ike_news.set()
            case do.Initiate():
                await self._ike.initiate(command.ike, command.child, command.limit)
            case do.Terminate():
                with suppress(IkeError):  # it went by itself meanwhile
                    await self._ike.terminate(command.ike, command.child)

    def _set_timer(self, command: do.StartTimer | do.StopTimer) -> None:
        running = self._timers.pop(command.timer, None)
        if running is not None:
            running.cancel()
        if isinstance(command, do.StartTimer):
            self._timers[command.timer] = asyncio.get_running_loop().call_later(
                command.seconds, self._queue.put_nowait, on.TimerFired(command.timer)
            )

    async def _publish(self, command: do.Publish) -> None:
        try:
            await self._data.publish(command.table, command.content)
        except OSError as error:
            # An old SPD table may say "live" of what is gone: nothing is live, and we end.
            if command.table is TableId.SPD:
                await self._data.publish(TableId.SPD, EMPTY)
            raise GateError(
                f"cannot publish the {command.table.name} table: {error.strerror}",
                hint="protected flows are refused until a controller runs again",
            ) from error

    def _status(self) -> dict[str, Any]:
        known = {"pid": os.getpid(), "since": self._since, "ready": self._ready}
        return {**known, **report.of_gate(self._gate)}
