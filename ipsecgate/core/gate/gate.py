"""The gate's state machine: each event is applied, and answered with commands.

    FlowRefused            one Initiate for the CHILD_SA that would protect the flow
    XFRM notifications, ChildUp, ChildDown
                           the SPD table (Publish), or entries of it (Change)
    IkeConnected           policies, where none are configured; which SAs are confirmed; one-way
                           children (Terminate)
    PathsResolved          where routing leads flows, hence which kernel policy wins
    Reconfigured           the stricter part first, then the tables, the laxer part last
    CallMade               Hold while an SA may come, then Answer
    Wanted                 as FlowRefused: somebody waits for the SA of a flow

Rules of this module: only the kernel's state opens a flow, or IKE and routes where the daemon does
ESP itself. Time passes only by timers. Anything that cannot be represented is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from random import random

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.demand import Demand
from ipsecgate.core.gate.holds import Holds
from ipsecgate.core.gate.host_floor import NO_EFFECT
from ipsecgate.core.gate.ike import Ike
from ipsecgate.core.gate.name_lookups import NameLookups
from ipsecgate.core.gate.negotiations import Negotiations
from ipsecgate.core.gate.one_way import OneWayChildren
from ipsecgate.core.gate.policy_table import PolicyTable
from ipsecgate.core.gate.propagation import Propagation
from ipsecgate.core.gate.protection import Protection, StateEvent
from ipsecgate.core.gate.refused_flows import RefusedFlows
from ipsecgate.core.gate.requests import Requests, is_request
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import Flow
from ipsecgate.core.model.ipsec import ChildConfig, ChildSa
from ipsecgate.core.model.policy import Policy, Settings
from ipsecgate.core.model.problem import Problem
from ipsecgate.core.tables.flow_index import FlowIndex
from ipsecgate.core.tables.layout import TableId
from ipsecgate.core.tables.table import Table


class Gate:
    """The whole state of the controller.

    `remembered`: the children that a predecessor saw loaded. `spread`: returns 0 to 1 at random.
    """

    def __init__(
        self,
        settings: Settings,
        remembered: Iterable[ChildConfig] = (),
        spread: Callable[[], float] = random,
    ) -> None:
        self.protection = Protection(settings.sa_source)
        self.policy_table = PolicyTable(settings, remembered)
        self.ike = Ike()
        flow_index = FlowIndex()
        self.negotiations = Negotiations(flow_index, spread)
        self.holds = Holds(settings.errnos, flow_index)
        self.demand = Demand(self.policy_table, self.protection, self.ike, self.negotiations)
        self.refused = RefusedFlows(flow_index)
        self._propagate = Propagation(
            self.protection,
            self.policy_table,
            self.negotiations,
            self.holds,
            refused=self.refused,
            flow_index=flow_index,
        )
        self._one_way = OneWayChildren()
        self.lookups = NameLookups()
        self._requests = Requests(
            self.demand,
            self.holds,
            self._propagate,
            refused=self.refused,
            lookups=self.lookups,
            policy_table=self.policy_table,
            routing=self.protection.routing,
        )
        self._pending: Settings | None = None  # a configuration that waits for its paths

    @property
    def settings(self) -> Settings:
        """Return the configuration in force."""
        return self.policy_table.settings

    @property
    def consequence(self) -> str:
        """Return what happens to flows that must be protected, and are not."""
        if self.settings.audit:
            return "in audit mode nothing is refused"
        return "protected flows are refused"

    @property
    def policies(self) -> tuple[Policy, ...]:
        """Return the policies in force."""
        return self.policy_table.policies

    @property
    def tables(self) -> dict[TableId, Table]:
        """Return the hook tables as published so far, without those that are only partly."""
        spd_table = self.protection.spd_table
        contents = {
            TableId.POLICY: self.policy_table.content,
            TableId.SPD: None if spd_table.is_partial else spd_table.content,
        }
        return {table: content for table, content in contents.items() if content is not None}

    @property
    def errors(self) -> list[Problem]:
        """Return the problems that the operator should fix."""
        errors = [*self.protection.errors, *self.policy_table.errors, *self.lookups.errors]
        if self.settings.floor and self.protection.in_userspace:
            errors.append(NO_EFFECT)
        return errors

    def start(self) -> list[do.Command]:
        """Return the commands that make the hooks refuse unprotected flows from the start.

        None while no policy is known: hooks without a table refuse everything.
        """
        if not self.policies:
            return []
        return [*self._propagate.after_policies(), *self._ask_paths()]

    def step(self, *events: on.Event, between: bool = False, now: float = 0.0) -> list[do.Command]:
        """Apply events; return the commands that they lead to, in order.

        Requests of applications are applied last: a process that makes many must not delay a
        change that closes a flow. `between`: more of the kernel's notifications follow, and only
        together they give a state that the kernel had. `now`: wall clock, seconds since the epoch;
        it tells people when a negotiation failed, and decides nothing.
        """
        self.protection.is_between = between
        self.negotiations.now = now
        events = tuple(sorted(events, key=is_request))
        commands: list[do.Command] = []
        for is_notification, group in groupby(events, lambda e: isinstance(e, StateEvent)):
            if is_notification:
                commands += self._notified([e for e in group if isinstance(e, StateEvent)])
            else:
                for event in group:
                    commands += [] if isinstance(event, StateEvent) else self._take(event)
        if self.protection.kernel_state.is_adopting:
            commands += self._adopt_dump()
        if self.protection.pending:
            commands += self._propagate.after_protection()
        commands += self._requests.answer_held()
        commands += self._requests.report_covered()
        if any(isinstance(event, on.CheckDue) for event in events):
            # Last, because a table's content is what it is after every other command.
            # Copies, because the comparison takes longer than a step.
            tables = self.tables.items()
            commands += [do.Verify(table, content.copy()) for table, content in tables]
        return commands

    @property
    def has_more(self) -> bool:
        """Tell whether another step has something to do, even without an event."""
        return self._requests.has_due or self.is_busy

    @property
    def is_busy(self) -> bool:
        """Tell whether the kernel's notifications so far have yet to take full effect."""
        return self.protection.pending or self.protection.kernel_state.is_adopting

    def _take(self, event: on.CallEvent | on.OtherEvent) -> list[do.Command]:
        match event:
            case on.FlowRefused():
                return self._requests.flow_refused(event)
            case on.CallMade():
                return self._requests.call_made(event)
            case on.Wanted():
                return self._requests.wanted(event)
            case on.CallExpired() | on.CallInterrupted() | on.CallGone():
                return self.holds.ended(event)
            case on.KernelSnapshot():
                self.protection.snapshot(event)
                return self._adopt_dump()
            case on.PathsResolved():
                return self._rerouted(self.protection.resolved(event))
            case on.ServicesResolved(services):
                self.protection.services.resolved(services)
                return [*self._propagate.after_services(), *self._ask_paths()]
            case on.OriginGone(origin):
                return self._rerouted(self.protection.routing.gone(origin))
            case on.TimerFired(timer):
                return self._timer_fired(timer)
            case on.CheckDue():
                return []  # at the end of the step
            case on.Reconfigured(settings):
                return self._reconfigure(settings)
        return self._take_ike(event)

    def _take_ike(self, event: on.IkeConnected | on.IkeEvent) -> list[do.Command]:
        match event:
            case on.IkeConnected():
                return self._ike_connected(event)
            case on.IkeGone():
                return self._ike_gone(event)
            case on.IkeUnparsed(reason):
                return [*self.ike.log_unread((reason,)), do.AskIke()]
            case on.NegotiationFailed(name, cause):
                failed = self._propagate.pass_on(self.demand.failed(name, cause))
                return [*failed, *self.lookups.failed(name, cause)]
            case on.NegotiationDone(name):
                self.lookups.up(name)
                return self._propagate.pass_on(self.demand.done(name))
            case on.IkeUp() | on.IkeDown() | on.ChildUp() | on.ChildDown():
                return []  # children are reported one by one, and applied together

    # --- what is protected --------------------------------------------------------------

    def _notified(self, events: Sequence[StateEvent]) -> list[do.Command]:
        """Apply notifications that arrived together, then publish once.

        One SA arrives as several notifications, and only all of them show whether it protects.
        """
        changes = [self.protection.notified(event) for event in events]
        for event in events:
            if isinstance(event, on.ChildUp):
                self.lookups.up(event.sa.name)
        commands = self._propagate.after_protection() if any(changes) else []
        policies = [event.entry for event in events if isinstance(event, on.PolicySet)]
        if any(map(self.protection.may_be_unknown, policies)):
            commands.append(do.AskIke())
        return commands

    def _adopt_dump(self) -> list[do.Command]:
        """Apply a slice of a dump; pass on what it changes once all of it is applied."""
        drift = self.protection.adopt()
        if drift is None:
            return []
        self._propagate.spd_read()
        text = f"{drift} policies or SAs differed from the kernel's: repaired"
        log = [do.Log("error", text)] if drift else []
        return [*log, *self._propagate.after_protection(), *self._propagate.after_policies()]

    def _rerouted(self, set_paths: list[do.Command]) -> list[do.Command]:
        self._propagate.after_routes()
        changed = [*self._propagate.after_protection(), *self._adopt(), *self._propagate.floor()]
        return [*set_paths, *changed]

    # --- timers and live flows -----------------------------------------------------------

    def is_cut_off(self, flow: Flow) -> bool:
        """Tell whether an established flow has lost the SA that it must have."""
        return self.demand.is_cut_off(flow)

    def _timer_fired(self, timer: on.Timer) -> list[do.Command]:
        if timer.kind == "one-way":
            return self._one_way.timer_fired(timer.name, self._one_way_children())
        commands: list[do.Command] = []
        flow = self.negotiations.unconfirmed(timer)
        if flow is not None:
            # If somebody emptied the kernel's databases, IKE would report the child up forever.
            stale = self.protection.stale(timer.name, flow)
            commands += [do.Terminate(timer.name.whole, sa.unique) for sa in stale]
        return commands + self._propagate.pass_on(self.demand.timer_fired(timer))

    # --- policies -------------------------------------------------------------------------

    def _ask_paths(self) -> list[do.Command]:
        """Have the paths to the protected networks resolved, but for a pending configuration."""
        if self._pending is not None:
            return []
        networks, services = self.policy_table.networks(), self.protection.services.networks
        if services:
            networks = tuple(dict.fromkeys((*networks, *services)))
        return self.protection.routing.follow(networks)

    def _reconfigure(self, settings: Settings) -> list[do.Command]:
        """Adopt a configuration, as soon as the paths are known that its policies need.

        Until then the old one stays in force: flows that an SA covers would be refused for want
        of a path.
        """
        self._pending = settings
        learned = self.policy_table.learn(settings, self.ike.loaded.children)
        routing = self.protection.routing
        wanted = (*routing.destinations, *self.policy_table.networks(settings))
        resolve = routing.follow(tuple(dict.fromkeys(wanted)))
        return [*learned, *(resolve or self._adopt())]

    def _adopt(self) -> list[do.Command]:
        """Put the pending configuration in force if its paths are known."""
        old, new = self.settings, self._pending
        if new is None or not self.protection.routing.are_known(self.policy_table.networks(new)):
            return []
        self._pending, self.policy_table.settings, self.holds.errnos = None, new, new.errnos
        self.holds.recheck_all()
        self.demand.policies_changed()
        error = new.errnos.uncovered
        return [
            do.SetModes(old.audit and new.audit, old.deny or new.deny, error),  # the stricter part
            *self._propagate.after_policies(),
            do.SetModes(new.audit, new.deny, error),
            *self._ask_paths(),
            do.AskIke(),  # for the policies to start at once
            do.Adopted(),
        ]

    # --- the IKE daemon -------------------------------------------------------------------

    def _ike_connected(self, event: on.IkeConnected) -> list[do.Command]:
        """Apply a list of what the daemon has; it comes often, and mostly changes nothing."""
        was_gone = self.ike.problem is not None
        commands = self.ike.log_connected(event, self.settings.sa_source) if was_gone else []
        before = self.ike.loaded
        if self.ike.connected(event):
            self.holds.recheck_all()
        if self.ike.loaded is not before:
            self.negotiations.loaded(before, self.ike.loaded)
        self.holds.recheck_idle()
        commands += self.ike.log_unread(event.unread)
        changed = self.protection.ike_connected(event) or was_gone
        commands += self.policy_table.learn(self.settings, event.children)
        if changed:
            commands += self._propagate.after_protection()
        commands += self._propagate.after_policies()
        commands += self._one_way.listed(event.established, self._one_way_children())
        commands += self._ask_paths()
        return commands + self._propagate.pass_on(self.demand.retry())

    def _one_way_children(self) -> set[ChildSa]:
        """Return the one-way children that must be protected; none in audit mode."""
        if self.settings.audit:
            return set()
        return self.protection.one_way(self.policy_table.networks())

    def _ike_gone(self, event: on.IkeGone) -> list[do.Command]:
        changed = self.ike.gone(event)
        self.protection.ike_gone()
        if not changed:
            return []
        return [
            *self._propagate.after_protection(),
            do.ExemptIke(0),
            do.Log(
                "error",
                f"{self.consequence}: {event.problem}",
                fields=(("event", "ike-gone"), ("cause", event.problem.text)),
            ),
            *self._propagate.pass_on(self.negotiations.ike_gone()),
        ]
