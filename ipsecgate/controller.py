"""The shell around the core: descriptors become events, commands are carried out.

    ring, held calls, XFRM, VICI, routes, timers
        --events--> Gate.step --commands--> maps, VICI, timers, answers to the held calls

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
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from ipsecgate import loader, report
from ipsecgate.core import commands as do
from ipsecgate.core import events as on
from ipsecgate.core.gate import Gate
from ipsecgate.core.layout import Setting, TableId
from ipsecgate.core.policy import SaSource
from ipsecgate.core.table import EMPTY
from ipsecgate.core.vici import ViciError
from ipsecgate.edges import cgroups, control, memory, probe, systemd
from ipsecgate.edges.config import Config
from ipsecgate.edges.datapath import Datapath
from ipsecgate.edges.ike import IkeClient
from ipsecgate.edges.listeners import Listeners
from ipsecgate.edges.routes import Routes
from ipsecgate.edges.vici import IkeError, IkeUnreachableError
from ipsecgate.edges.xfrm import XfrmMonitor
from ipsecgate.errors import GateError
from ipsecgate.lock import held
from ipsecgate.paths import Paths

log = logging.getLogger("ipsecgate")

IKE_POLL = 2.0  # seconds between looks at the loaded connections: VICI has no event for them
IKE_PAUSE = 0.05  # at least, however often somebody asks for a look
IKE_RETRY = 0.5  # seconds until the daemon is tried again
IKE_CONNECT = 5.0  # seconds it has to answer at first
QUEUED_REFUSALS = 256


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
        # From the kernel's word that a policy is gone until it is refused, flows leave in clear.
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, -20)
        await Controller(paths, config).run()


def _first(error: BaseException) -> BaseException:
    """Return what went wrong first, out of the groups that tasks wrap it in."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


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
        self._listeners = Listeners(self._on_call, paths.holds)
        self._ike_trouble = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self._since = time.time()
        self._ready = False
        self._waiting = False  # for an event

    async def run(self) -> None:
        """Follow everything until told to end."""
        loop = asyncio.get_running_loop()
        self._data.set(Setting.NETNS, probe.netns_cookie())
        self._data.set(Setting.ERROR, self._config.settings.errnos.uncovered)
        self._set_modes(tighten=True)
        ring = self._data.open_ring(self._on_refusal)
        loop.add_reader(ring, self._data.drain)
        self._listeners.adopt(systemd.kept())
        verbs = {"status": self._status, "hold": self._take_listener}
        try:
            async with (
                control.serving(self._paths.control, verbs),
                asyncio.TaskGroup() as tasks,
            ):
                work = [
                    tasks.create_task(self._decide()),
                    tasks.create_task(self._follow_kernel()),
                    tasks.create_task(self._routes.run()),
                    tasks.create_task(self._follow_ike()),
                ]
                for number in (signal.SIGTERM, signal.SIGINT):
                    loop.add_signal_handler(number, lambda: [task.cancel() for task in work])
        except BaseExceptionGroup as group:
            raise _first(group) from None
        finally:
            loop.remove_reader(ring)
            self._listeners.close()
            self._data.close()

    def _set_modes(self, *, tighten: bool) -> None:
        """Set what can be stricter at once, and what is laxer when the tables are in."""
        audit, deny = self._config.settings.audit, self._config.settings.deny
        if audit is not tighten:
            self._data.set(Setting.AUDIT, int(audit))
        if deny is tighten:
            self._data.set(Setting.DENY, int(deny))

    # --- events in ------------------------------------------------------------------

    def _on_refusal(self, refusal: on.FlowRefused) -> None:
        # A process that tries every port must not hold up the kernel's news; what is
        # dropped here the hook tells again.
        if self._queue.qsize() < QUEUED_REFUSALS:
            self._queue.put_nowait(refusal)

    def _on_call(self, event: on.CallEvent) -> None:
        # Most calls are for flows that are covered: these need not wait for their turn.
        if isinstance(event, on.CallMade) and self._idle and self._gate.is_free(event.flow):
            self._listeners.answer(event.call, None)
        else:
            self._queue.put_nowait(event)

    @property
    def _idle(self) -> bool:
        """Tell whether all that happened was decided, and all commands carried out."""
        return self._waiting and self._queue.empty()

    async def _follow_kernel(self) -> None:
        source = self._config.settings.sa_source
        if source is SaSource.VICI:
            return
        if source is SaSource.AUTO and not probe.has_xfrm():
            self._on_kernel(on.KernelSnapshot((), ()))  # nor will there ever be anything
            return
        async with XfrmMonitor(self._on_kernel, self._on_overrun) as kernel:
            await kernel.run()

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
            self._waiting = True
            events = [await self._queue.get()]
            self._waiting = False
            while not self._queue.empty():
                events.append(self._queue.get_nowait())
            for command in self._gate.step(*events):
                try:
                    await self._execute(command)
                except OSError as error:
                    raise GateError(
                        f"cannot {type(command).__name__}: {error.strerror or error}",
                        hint="uncovered flows stay refused until a controller runs again",
                    ) from error
            self._tell_ready()

    def _tell_ready(self) -> None:
        # The SPD table comes last: it waits until both the kernel and IKE were heard.
        if not self._ready and TableId.SPD in self._gate.published.tables:
            self._ready = True
            self._set_modes(tighten=False)
            systemd.notify("READY=1\nSTATUS=following the kernel and IKE")
            log.info("ready")

    async def _follow_ike(self) -> None:
        while True:
            try:
                async with asyncio.timeout(IKE_CONNECT):
                    client = await IkeClient.connect(self._config.vici)
                await self._with_ike(client)
            except TimeoutError:
                self._queue.put_nowait(on.IkeGone(f"no answer within {IKE_CONNECT:.0f} s"))
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
        userland: bool | None = None  # a daemon keeps its plugins as long as it lives
        while True:
            self._ike_news.clear()
            try:
                if userland is None:
                    userland = await client.userland()
                children = await client.children()
                established = await client.established()
            except IkeUnreachableError:
                return  # IkeGone says so
            except (IkeError, ViciError) as error:
                # What was known stays in force; a connection that cannot be read is told.
                if str(error) != self._ike_trouble:
                    log.error("cannot read strongSwan's connections: %s", error)
                self._ike_trouble = str(error)
                await asyncio.sleep(IKE_POLL)
                continue
            self._ike_trouble = ""
            self._queue.put_nowait(
                on.IkeConnected(children, established, client.daemon_pid, userland)
            )
            with suppress(TimeoutError):
                async with asyncio.timeout(IKE_POLL):
                    await self._ike_news.wait()
            await asyncio.sleep(IKE_PAUSE)

    # --- commands out -----------------------------------------------------------------

    async def _execute(self, command: do.Command) -> None:
        match command:
            case do.SetEntry():
                self._data.set_entry(command.table, command.index, command.key, command.entry)
            case do.Publish():
                await self._publish(command)
            case do.Answer():
                self._listeners.answer(command.call, command.error)
            case do.Hold():
                self._listeners.hold(command.made)
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
                self._remember(command)
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
                self._later(self._terminate(self._ike, command))

    async def _terminate(self, ike: IkeClient, command: do.Terminate) -> None:
        with suppress(IkeError):  # it went by itself meanwhile
            await ike.terminate(command.ike, command.child)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        """Do what may take long beside the decisions: closing a flow must not wait for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _remember(self, command: do.Remember) -> None:
        try:
            memory.keep(self._paths.remembered, command.children)
        except OSError as error:
            log.error("cannot keep %s: %s", self._paths.remembered, error)

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

    def _take_listener(self, request: control.Request) -> dict[str, Any]:
        self._listeners.take(request.pid, int(request.words["fd"]), float(request.words["limit"]))
        return {}

    def _status(self, _request: control.Request) -> dict[str, Any]:
        known = {"pid": os.getpid(), "since": self._since, "ready": self._ready}
        return {**known, **report.of_gate(self._gate)}
