"""The shell around the core: descriptors become events, commands are carried out.

    ring, held calls, XFRM, VICI, routes, timers
        --events--> Gate.step --commands--> maps, VICI, timers, answers to the held calls

Rules of this module: no decisions. One queue and one consumer, so events are handled one
after the other. Between two slices of them the kernel's notifications are read, and they come
first (`core.gate.event_queue`). A command that fails ends the process; the hooks stay and keep
refusing what no SA covers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from ipsecgate.admin import loader, status
from ipsecgate.admin.status_document import ControllerStatus, Process
from ipsecgate.controller.hook_writer import HookWriter
from ipsecgate.controller.ike_follower import IkeFollower
from ipsecgate.controller.journal import Journal
from ipsecgate.controller.reload import Reload, refuse_what_needs_a_restart
from ipsecgate.controller.service import Service
from ipsecgate.controller.targets import Targets
from ipsecgate.controller.xfrm_follower import XfrmFollower
from ipsecgate.core.codec.oci import Container
from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.event_queue import EventQueue
from ipsecgate.core.gate.gate import Gate
from ipsecgate.core.model import events as on
from ipsecgate.core.state.floor import tag_of
from ipsecgate.core.tables.layout import TableId
from ipsecgate.edges.bpf.datapath import Datapath
from ipsecgate.edges.holding import oci
from ipsecgate.edges.holding.listeners import Listeners
from ipsecgate.edges.host import control, saved_state, systemd
from ipsecgate.edges.host.config import Config
from ipsecgate.edges.kernel import probe, sockets
from ipsecgate.edges.kernel.floor import Floor
from ipsecgate.edges.kernel.routes import Routes
from ipsecgate.errors import GateError
from ipsecgate.lock import held
from ipsecgate.paths import Paths

log = logging.getLogger("ipsecgate")


async def run(paths: Paths, read: Callable[[], Config]) -> None:
    """Run one instance's controller until SIGTERM or SIGINT; `read` reads the configuration.

    Raises: GateError for what the operator can mend.
    """
    config = read()
    loader.check_targets(paths, config)
    busy = f"a controller of instance {paths.instance!r} is running"
    with held(paths.run_instance / "controller.lock", wait=False, busy=busy):
        loader.load(paths)
        # From the kernel's word that a policy is gone until it is refused, flows leave in clear.
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, -20)
        await Controller(paths, config, read).run()


def _first(error: BaseException) -> BaseException:
    """Return what went wrong first, out of the groups that tasks wrap it in."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class Controller:
    """One instance's edges, and the gate between them."""

    def __init__(self, paths: Paths, config: Config, read: Callable[[], Config]) -> None:
        self._paths = paths
        self._config = config
        self._reload = Reload(read, self._in_force)
        self._targets = Targets(paths, loader.check_targets(paths, config))
        self._gate = Gate(config.settings, saved_state.recall(paths.remembered))
        self._data = Datapath(loader.pins_of(paths))
        self._hooks = HookWriter(self._data)
        self._queue = EventQueue()
        self._news = asyncio.Event()  # something is in it
        self._timers: dict[on.Timer, asyncio.TimerHandle] = {}
        self._kernel = XfrmFollower(config.settings.sa_source, self._on_kernel)
        self._ike = IkeFollower(config.vici, self._put)
        self._routes = Routes(self._put)
        self._listeners = Listeners(self._on_call, paths.holds)
        self._journal = Journal()
        self._tasks: set[asyncio.Task[None]] = set()
        self._service = Service()
        self._unkept: do.Remember | None = None
        self._since = time.time()
        self._ready = False
        self._adopted = asyncio.Event()
        self._floor = Floor(tag_of(paths.instance))
        self._waiting = False  # for an event

    async def run(self) -> None:
        """Follow everything until told to end."""
        loop = asyncio.get_running_loop()
        self._hooks.begin(self._config.settings, probe.netns_cookie())
        await self._targets.look()
        ring = self._data.open_ring(self._on_refusal)
        loop.add_reader(ring, self._data.drain)
        self._listeners.adopt(systemd.kept())
        log.addHandler(self._journal)
        verbs = {
            "status": self._status,
            "events": self._tell_events,
            "hold": self._take_listener,
            "reload": lambda _request: self._reload.run(),
        }
        try:
            async with (
                control.serving(self._paths.control, verbs),
                asyncio.TaskGroup() as tasks,
            ):
                work = [
                    tasks.create_task(self._service.watch()),
                    tasks.create_task(self._decide()),
                    tasks.create_task(self._kernel.run()),
                    tasks.create_task(self._routes.run()),
                    tasks.create_task(self._ike.run()),
                    tasks.create_task(self._kernel.check(self._check_hooks)),
                    tasks.create_task(self._targets.run()),
                    tasks.create_task(self._floor.run()),
                    tasks.create_task(oci.run(self._paths.seccomp, self._on_container, log.error)),
                ]
                loop.add_signal_handler(signal.SIGHUP, lambda: self._later(self._reload.log()))
                for number in (signal.SIGTERM, signal.SIGINT):
                    loop.add_signal_handler(number, self._stop, work)
        except BaseExceptionGroup as group:
            raise _first(group) from None
        finally:
            loop.remove_reader(ring)
            self._listeners.close()
            self._data.close()
            log.removeHandler(self._journal)

    def _stop(self, work: list[asyncio.Task[None]]) -> None:
        self._service.stopping()
        for task in work:
            task.cancel()

    async def _in_force(self, config: Config) -> None:
        """Put a configuration in force: policies, then cgroups, and those it lost last."""
        refuse_what_needs_a_restart(self._paths.config, self._config, config)
        if not self._ready:
            raise GateError("the controller is starting", hint="try again in a moment")
        targets = loader.check_targets(self._paths, config)
        self._adopted.clear()
        self._put(on.Reconfigured(config.settings))
        await self._adopted.wait()
        self._config = config
        await self._targets.follow(targets)

    # --- events in ------------------------------------------------------------------

    def _put(self, event: on.Event) -> None:
        self._queue.put(event)
        self._news.set()

    def _on_refusal(self, refusal: on.FlowRefused) -> None:
        self._put(refusal)
        audit = self._gate.settings.audit
        self._journal.refusal(refusal, self._gate.policies, audit=audit)

    def _on_call(self, event: on.CallEvent) -> None:
        # Most calls are for flows that are covered: these need not wait for their turn.
        if isinstance(event, on.CallMade) and self._idle and self._gate.holds.is_free(event.flow):
            self._listeners.answer(event.call, None)
        else:
            self._put(event)

    @property
    def _idle(self) -> bool:
        """Tell whether all that happened was decided, and all commands carried out."""
        return self._waiting and not self._queue

    def _check_hooks(self) -> None:
        self._put(on.CheckDue())

    def _on_kernel(self, event: on.XfrmEvent | on.KernelSnapshot) -> None:
        self._put(event)
        if isinstance(event, on.KernelSnapshot):
            self._ike.look()  # which of these SAs does it vouch for?

    async def _decide(self) -> None:
        for command in self._gate.start():
            await self._execute(command)
        while True:
            events = await self._events()
            for command in self._gate.step(*events):
                try:
                    await self._execute(command)
                except OSError as error:
                    raise GateError(
                        f"cannot carry out {type(command).__name__}: {error.strerror or error}",
                        hint="uncovered flows stay refused until a controller runs again",
                    ) from error
            self._tell_ready()
            if self._service.alive():
                self._retry()
                self._service.tell(status.summary(self._gate))

    async def _events(self) -> list[on.Event]:
        """Return what is to be decided next; nothing if nothing happened for a pulse."""
        if self._queue or self._gate.holds.has_due:
            await asyncio.sleep(0)  # whoever has news, or asks something, has a turn
        else:
            self._news.clear()
            self._waiting = True
            with suppress(TimeoutError):
                async with asyncio.timeout(self._service.pulse):
                    await self._news.wait()
            self._waiting = False
        self._kernel.look()
        return self._queue.take()

    def _tell_ready(self) -> None:
        # The SPD table comes last: it waits until both the kernel and IKE were heard.
        if not self._ready and TableId.SPD in self._gate.tables:
            self._ready = True
            self._hooks.relax(self._config.settings)
            loader.switch(self._paths)
            self._service.tell(status.summary(self._gate))
            self._service.ready()
            log.info("ready")

    # --- commands out -----------------------------------------------------------------

    async def _execute(self, command: do.Command) -> None:
        match command:
            case do.Answer():
                self._listeners.answer(command.call, command.error)
            case do.Hold():
                self._listeners.hold(command.made)
            case do.SetFloor():
                self._floor.set(command.policies)
            case do.CutOff():
                self._later(self._cut_off())
            case do.Adopted():
                self._adopted.set()
            case do.ResolveSources():
                self._routes.follow(command.destinations)
            case do.StartTimer() | do.StopTimer():
                self._set_timer(command)
            case do.AskIke() | do.Initiate() | do.Terminate():
                await self._ike.execute(command)
            case do.Remember():
                self._remember(command)
            case do.Log():
                log.log(logging.getLevelName(command.level.upper()), "%s", command.text)
            case _:
                await self._hooks.execute(command)

    async def _cut_off(self) -> None:
        """End the sockets that stand without an SA; what cannot be ended is blocked."""
        try:
            lost = [one for one in await sockets.standing() if self._gate.is_cut_off(one.flow)]
            gated = await asyncio.to_thread(loader.gated_ids, self._paths) if lost else ()
            ended = await sockets.destroy([one for one in lost if one.cgroup in gated])
        except OSError as error:
            log.warning("cannot close sockets, so their packets are blocked: %s", error.strerror)
        else:
            log.info("closed %d sockets that no SA protects any more", ended)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        """Do what may take long beside the decisions: closing a flow must not wait for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.result()  # a defect is the loop's, hence the service's

    def _remember(self, command: do.Remember) -> None:
        self._unkept = None
        try:
            saved_state.keep(self._paths.remembered, command.children)
        except OSError as error:
            self._unkept = command
            log.error("cannot write %s: %s", self._paths.remembered, error.strerror or error)

    def _retry(self) -> None:
        if self._unkept is not None:
            self._remember(self._unkept)

    def _set_timer(self, command: do.StartTimer | do.StopTimer) -> None:
        running = self._timers.pop(command.timer, None)
        if running is not None:
            running.cancel()
        if isinstance(command, do.StartTimer):
            self._timers[command.timer] = asyncio.get_running_loop().call_later(
                command.seconds, self._put, on.TimerFired(command.timer)
            )

    def _on_container(self, container: Container, listener: int) -> None:
        self._listeners.add(listener, container.hold)
        log.info("holding the calls of container %s", container.name)
        self._later(self._warn_if_ungated(container))

    async def _warn_if_ungated(self, container: Container) -> None:
        try:
            gated = await asyncio.to_thread(loader.is_gated, self._paths, container.pid)
        except (ProcessLookupError, FileNotFoundError):
            return  # it has ended already
        except (OSError, GateError) as error:  # a warning less, and nothing else less
            log.warning("cannot check whether container %s is gated: %s", container.name, error)
            return
        if not gated:
            log.warning(
                "container %s is not gated: the hooks do not check its calls", container.name
            )

    async def _take_listener(self, request: control.Request) -> dict[str, Any]:
        self._listeners.take(request.pid, int(request.words["fd"]), float(request.words["limit"]))
        return {}

    async def _tell_events(self, request: control.Request) -> dict[str, Any]:
        return {"events": self._journal.since(int(request.words["since"]))}

    async def _status(self, _request: control.Request) -> ControllerStatus:
        process = Process(
            pid=os.getpid(),
            since=self._since,
            ready=self._ready,
            tasks=len(asyncio.all_tasks()),
            timers=len(self._timers),
        )
        errors = [*self._targets.errors, *self._reload.errors, *self._floor.errors]
        if self._unkept is not None:
            errors.insert(
                0,
                f"{self._paths.remembered} cannot be written: after a restart without strongSwan "
                "the gate would protect the older set of policies that the file holds",
            )
        return status.controller_status(
            self._gate, process, changed_entries=self._hooks.mended, errors=errors
        )
