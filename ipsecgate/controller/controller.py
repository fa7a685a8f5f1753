"""The shell around the core: events go in, commands are carried out.

    ring, held calls, XFRM, VICI, routes, timers
        --events--> Gate.step --commands--> maps, VICI, timers, answers to held calls

Rules of this module: the gate decides. There is one queue with one consumer, so events are handled
one after the other. Before each slice of them the kernel's notifications are read; they come first
(`core.gate.event_queue`). A command that fails ends the process, and the hooks go on refusing
uncovered flows.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from ipsecgate.admin import loader
from ipsecgate.controller import report
from ipsecgate.controller.callers import NOBODY, Caller, Callers
from ipsecgate.controller.command_queue import CommandQueue
from ipsecgate.controller.containers import Containers
from ipsecgate.controller.cut_off import close_sockets
from ipsecgate.controller.garbage import Garbage
from ipsecgate.controller.hook_writer import HookWriter
from ipsecgate.controller.ike_follower import IkeFollower
from ipsecgate.controller.journal import Journal, Once
from ipsecgate.controller.namespaces import Namespaces
from ipsecgate.controller.order import Order
from ipsecgate.controller.reload import Reload, refuse_what_needs_a_restart
from ipsecgate.controller.remembered import Remembered
from ipsecgate.controller.service import Service
from ipsecgate.controller.takeover import Takeover
from ipsecgate.controller.tally import Tally
from ipsecgate.controller.targets import Targets
from ipsecgate.controller.time_to_covered import TimesToCovered
from ipsecgate.controller.timers import Timers
from ipsecgate.controller.verbs import Verbs
from ipsecgate.controller.waiters import Waiters
from ipsecgate.controller.xfrm_follower import XfrmFollower
from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.event_queue import EventQueue
from ipsecgate.core.gate.gate import Gate
from ipsecgate.core.gate.name_lookups import is_lookup
from ipsecgate.core.model import events as on
from ipsecgate.core.model.nat import Ruleset
from ipsecgate.core.nat.translation import Nat
from ipsecgate.core.state.floor import instance_tag
from ipsecgate.core.tables.layout import Reason, TableId
from ipsecgate.edges.bpf.datapath import Datapath
from ipsecgate.edges.holding import oci
from ipsecgate.edges.holding.listeners import Listeners
from ipsecgate.edges.host import control_server, saved_state, systemd
from ipsecgate.edges.host.config import Config
from ipsecgate.edges.kernel import probe
from ipsecgate.edges.kernel.floor import Floor
from ipsecgate.edges.kernel.nat import NatWatch
from ipsecgate.edges.kernel.routes import Routes
from ipsecgate.errors import GateError
from ipsecgate.lock import held
from ipsecgate.paths import Paths

log = logging.getLogger("ipsecgate")


async def run(paths: Paths, read: Callable[[], Config]) -> None:
    """Run one instance's controller until SIGTERM or SIGINT; `read` reads the configuration.

    Raises: GateError if it cannot start or go on.
    """
    config = read()
    loader.check_targets(paths, config)
    busy = f"a controller of instance {paths.instance!r} is running"
    with held(paths.run_instance / "controller.lock", wait=False, busy=busy):
        loader.load(paths, audit=config.settings.audit)
        # After the kernel deletes a policy, flows leave in clear until we have closed them.
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, -20)
        await Controller(paths, config, read).run()


def _first(error: BaseException) -> BaseException:
    """Return the first exception inside the groups that a TaskGroup raises."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class Controller:
    """One instance's edges, and the gate between them."""

    def __init__(self, paths: Paths, config: Config, read: Callable[[], Config]) -> None:
        self._paths = paths
        self._config = config
        self._reload = Reload(read, self._adopt)
        self._targets = Targets(paths, loader.check_targets(paths, config))
        self._gate = Gate(config.settings, saved_state.load_children(paths.remembered))
        self._data = Datapath(loader.pins_of(paths))
        self._data.on_pause = self._close_meanwhile
        self._hooks = HookWriter(self._data)
        self._commands = CommandQueue(self._data.cut)
        self._closing = False  # whether more may have to be closed while something is written
        self._overtaken = False  # whether a step has only passed on what closes
        self._takeover = Takeover(self._data)
        self._queue = EventQueue()
        self._queued = asyncio.Event()  # set while the queue may hold events
        self._timers = Timers(self._put)
        self._kernel = XfrmFollower(config.settings.sa_source, self._on_kernel)
        self._ike = IkeFollower(config.vici, self._put)
        self._routes = Routes(self._put)
        self._nat = NatWatch(self._on_nat)
        self._order = Order(paths)
        self._namespaces = Namespaces(paths, probe.netns_cookie(), self._put)
        self._listeners = Listeners(self._put, paths.holds)
        self._journal = Journal(awaited=lambda refusal: report.awaited(self._gate, refusal.flow))
        self._tally = Tally()
        self._callers = Callers(self._record)
        self._once = Once(log)
        self._waiters = Waiters(self._gate, self._put, self._ike.execute)
        self._times = TimesToCovered()
        self._service = Service()
        self._garbage = Garbage()
        self._remembered = Remembered(paths.remembered)
        self._since = time.time()
        self._ready = False
        self._adopted = asyncio.Event()
        self._floor = Floor(instance_tag(paths.instance))

    async def run(self) -> None:
        """Run until SIGTERM, SIGINT or a defect. Raises: the first exception of any part."""
        loop = asyncio.get_running_loop()
        self._hooks.begin(self._config.settings, probe.netns_cookie())
        log.addFilter(self._once)
        for origin in self._data.origins:
            self._resolve(do.FollowOrigin(origin, 0))
        await self._targets.scan()
        ring = self._data.open_ring(self._on_refusal)
        loop.add_reader(ring, self._data.drain)
        self._listeners.adopt(systemd.kept())
        containers = Containers(self._paths, self._listeners, self._service)
        log.addHandler(self._journal)
        try:
            async with (
                control_server.serving(
                    self._paths.control, self._verbs().handlers(), self._waiters.verbs
                ),
                asyncio.TaskGroup() as tasks,
            ):
                work = [
                    tasks.create_task(self._service.watch()),
                    tasks.create_task(self._decide()),
                    tasks.create_task(self._takeover.run()),
                    tasks.create_task(self._kernel.run()),
                    tasks.create_task(self._routes.run()),
                    tasks.create_task(self._nat.run()),
                    tasks.create_task(self._order.run()),
                    tasks.create_task(self._namespaces.run()),
                    tasks.create_task(self._ike.run()),
                    tasks.create_task(self._kernel.check(self._check_hooks)),
                    tasks.create_task(self._targets.run()),
                    tasks.create_task(self._waiters.run()),
                    tasks.create_task(self._floor.run()),
                    tasks.create_task(self._callers.run()),
                    tasks.create_task(oci.run(self._paths.seccomp, containers.add, log.error)),
                ]
                loop.add_signal_handler(signal.SIGHUP, self._on_reload_signal)
                for number in (signal.SIGTERM, signal.SIGINT):
                    loop.add_signal_handler(number, self._stop, work)
        except BaseExceptionGroup as group:
            raise _first(group) from None
        finally:
            loop.remove_reader(ring)
            self._listeners.close()
            self._data.close()
            self._once.tell_repeats(everything=True)
            self._journal.end()
            log.removeFilter(self._once)
            log.removeHandler(self._journal)

    def _verbs(self) -> Verbs:
        return Verbs(
            gate=self._gate,
            parts=(
                self._remembered,
                self._targets,
                self._namespaces,
                self._reload,
                self._floor,
                self._nat,
                self._order,
            ),
            config=lambda: self._config,
            is_ready=lambda: self._ready,
            since=self._since,
            hooks=self._hooks,
            journal=self._journal,
            listeners=self._listeners,
            namespaces=self._namespaces,
            reload=self._reload,
            tally=self._tally,
            targets=self._targets,
            timers=self._timers,
            times=self._times,
        )

    def _on_reload_signal(self) -> None:
        self._service.spawn(self._reload.run_logged())

    def _stop(self, work: list[asyncio.Task[None]]) -> None:
        self._service.stopping()
        for task in work:
            task.cancel()

    async def _adopt(self, config: Config) -> None:
        """Put a configuration in force: policies first, then gate cgroups, ungate others last.

        Raises: UsageError, GateError; the old configuration then stays in force.
        """
        refuse_what_needs_a_restart(self._paths.config, self._config, config)
        if not self._ready:
            raise GateError("the controller is starting", hint="try again in a moment")
        targets = loader.check_targets(self._paths, config)
        self._adopted.clear()
        self._put(on.Reconfigured(config.settings))
        await self._adopted.wait()
        self._config = config
        await self._targets.change(targets)

    # --- events in ------------------------------------------------------------------

    def _put(self, event: on.Event) -> None:
        self._queue.put(event)
        self._queued.set()
        if not isinstance(event, on.IkeConnected | on.IkeGone):
            self._ike.stir()

    def _on_refusal(self, refusal: on.FlowRefused) -> None:
        if is_lookup(refusal.flow):
            caller = self._callers.known(refusal.cgroup, refusal.pid) or NOBODY
            refusal = replace(refusal, unit=caller.unit)
        self._put(refusal)
        if refusal.reason == Reason.BLOCK_CLEAR:
            self._order.suspect()
        self._tally.refusal(refusal, self._gate.policies)
        self._callers.put(refusal)

    def _record(self, refusal: on.FlowRefused, caller: Caller) -> None:
        audit, policies = self._gate.settings.audit, self._gate.policies
        self._journal.refusal(refusal, policies, audit=audit, caller=caller)

    def _on_nat(self, rules: Ruleset | None) -> None:
        # Rules that can't be read are an error in `status`; the backstop sees what they do.
        self._routes.translate(Nat(rules or Ruleset()))
        self._namespaces.look()

    def _check_hooks(self) -> None:
        self._garbage.collect()
        self._put(on.CheckDue())

    def _on_kernel(self, event: on.XfrmEvent | on.KernelSnapshot) -> None:
        self._takeover.put(event)
        self._put(event)
        if isinstance(event, on.KernelSnapshot):
            self._ike.poll_now()  # to see which of these SAs the daemon lists

    async def _decide(self) -> None:
        await self._data.take_over()
        await self._carry_out(self._gate.start())
        while True:
            events = await self._events()
            await self._carry_out(self._step(*events, between=self._queue.is_between))
            self._report_ready()
            self._garbage.freeze()
            if self._service.alive():
                self._remembered.retry()
                self._once.tell_repeats()
                self._journal.tell_repeats()
                self._service.report(report.summary(self._gate))

    def _step(self, *events: on.Event, between: bool) -> list[do.Command]:
        return self._gate.step(*events, between=between, now=time.time())

    async def _carry_out(self, commands: Sequence[do.Command]) -> None:
        """Execute commands in order. Raises: GateError."""
        writes = any(isinstance(command, do.HookWrite) for command in commands)
        if writes:
            # Flows that are free may be closed. Once more afterwards, because an answer in between
            # may come before the write that closes its flow.
            self._listeners.end_epoch()
            self._waiters.writing()
        self._commands.put(commands)
        while (command := self._commands.take()) is not None:
            try:
                await self._execute(command)
            except OSError as error:
                raise GateError(
                    f"cannot carry out {type(command).__name__}: {error.strerror or error}",
                    hint="uncovered flows stay refused until a controller runs again",
                ) from error
        if writes:
            self._listeners.end_epoch()
        self._waiters.stir()

    def _close_meanwhile(self) -> None:
        """Close flows whose SAs are gone while a large change is being written.

        Everything else that this leads to is done after the commands that wait already.
        """
        self._kernel.read_now()
        events = self._queue.take_urgent()
        if not events and not self._closing:
            return
        self._listeners.end_epoch()
        self._closing = self._commands.overtake(self._step(*events, between=True))
        self._overtaken = True
        self._listeners.end_epoch()

    async def _events(self) -> list[on.Event]:
        """Return the events to handle next; none if none came within a pulse."""
        if self._queue or self._gate.has_more or self._overtaken:
            self._overtaken = False
            await asyncio.sleep(0)  # let other tasks deliver events and answer requests
        else:
            self._queued.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(self._service.until_pulse()):
                    await self._queued.wait()
        self._kernel.read_now()
        return self._queue.take(busy=self._gate.is_busy)

    def _report_ready(self) -> None:
        # The SPD table is published last, once the state of both the kernel and IKE is known.
        if not self._ready and TableId.SPD in self._gate.tables:
            self._ready = True
            self._takeover.end()
            self._hooks.relax(self._config.settings)
            loader.switch(self._paths)
            self._service.report(report.summary(self._gate))
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
                self._namespaces.set_floor(in_force=bool(command.policies))
            case do.Verify():
                self._service.spawn(self._hooks.verify(command))
            case do.CutOff():
                self._service.spawn(close_sockets(self._paths, self._gate.is_cut_off))
            case do.Adopted():
                self._adopted.set()
            case do.ResolvePaths() | do.FollowOrigin():
                self._resolve(command)
            case do.StartTimer() | do.StopTimer():
                self._timers.execute(command)
            case do.AskIke() | do.Initiate() | do.Terminate():
                await self._ike.execute(command)
            case do.Remember():
                self._remembered.execute(command)
            case do.Log() | do.Covered():
                self._tell(command)
            case _:
                await self._hooks.execute(command)

    def _tell(self, command: do.Log | do.Covered) -> None:
        if isinstance(command, do.Covered):
            if self._times.add(command, time.monotonic()):
                self._journal.covered(command)
            return
        level = logging.getLevelName(command.level.upper())
        told = {
            "about": command.about,
            "is_change": command.is_change,
            "fields": dict(command.fields),
        }
        log.log(level, "%s", command.text, extra=told)

    def _resolve(self, command: do.ResolvePaths | do.FollowOrigin) -> None:
        if isinstance(command, do.ResolvePaths):
            self._routes.follow(command.destinations)
            self._namespaces.follow(command.destinations)
        elif command.origin.netns:
            self._namespaces.want(command.origin, command.pid)
        else:
            self._routes.follow_origin(command.origin)
