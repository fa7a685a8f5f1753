"""The gate's decisions: events in, commands out.

    FlowRefused      -> which CHILD_SA would protect it? one Initiate each
    XFRM events      -> the SPD table (Publish), or one entry of it (SetEntry)
    ChildUp, -Down   -> the same, where the IKE daemon does ESP itself
    IkeConnected     -> the policy table where none are configured; trust in SAs; children
                        that have lost what comes in (Terminate)
    SourcesResolved  -> which source an unbound flow has, hence which policy wins
    Reconfigured     -> what is stricter first, the policy table, what is laxer last
    CallMade         -> held while an SA may come (Hold), then answered (Answer)

Rules of this module: nothing is opened but by the kernel's mirror, or by IKE and
routes where the kernel does no ESP; nothing is decided by time but through timers,
and what cannot be represented is refused.
"""

from __future__ import annotations

from collections.abc import Iterable

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.coverage import Coverage
from ipsecgate.core.gate.derived import DerivedPolicies
from ipsecgate.core.gate.holds import FlowState, Holds
from ipsecgate.core.gate.hook_tables import HookTables
from ipsecgate.core.gate.ike import Ike
from ipsecgate.core.gate.negotiations import Negotiations
from ipsecgate.core.gate.one_way import OneWayChildren
from ipsecgate.core.gate.policy_table import PolicyTable
from ipsecgate.core.gate.protection import Protection
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import Flow, Network, is_exempt
from ipsecgate.core.model.ipsec import Action, ChildConfig, ChildName, ChildSa, Direction, SpdEntry
from ipsecgate.core.model.policy import Policy, SaSource, Settings
from ipsecgate.core.model.prefixes import PrefixSet, as_prefix
from ipsecgate.core.tables.flow_index import FlowIndex
from ipsecgate.core.tables.layout import TableId


class Gate:
    """The whole state of the controller. `remembered`: what IKE ever had loaded, of old."""

    def __init__(
        self,
        settings: Settings,
        remembered: Iterable[ChildConfig] = (),
        negotiations: Negotiations | None = None,
    ) -> None:
        self.hook_tables = HookTables()
        self.protection = Protection(settings.sa_source, self.hook_tables)
        self.negotiations = negotiations or Negotiations()
        self.policy_table = PolicyTable(
            settings,
            DerivedPolicies(remembered),
            self.hook_tables,
            self.protection,
            self.negotiations,
        )
        self.ike = Ike(self.policy_table, self.protection, self.negotiations)
        self._flow_index = FlowIndex(self.protection.key_of)
        self.negotiations.flow_index = self._flow_index
        self.holds = Holds(settings.errnos, self._state_of, self._flow_index)
        self._one_way = OneWayChildren()
        self._destinations: tuple[Network, ...] = ()
        self._cover = PrefixSet(())  # of these
        self._last_tun: int | None = None  # a predecessor may have told another
        self._rerouted = False  # and nobody has looked since at what is covered by which source
        self._next: Settings | None = None  # waits for the sources that it needs

    @property
    def settings(self) -> Settings:
        """The configuration in force."""
        return self.policy_table.settings

    @property
    def policies(self) -> tuple[Policy, ...]:
        """The policies in force."""
        return self.policy_table.policies

    def start(self) -> list[do.Command]:
        """Return what makes the hooks refuse what must be protected, from the first moment."""
        if not self.policies:
            return []  # nothing known: the hooks refuse everything until IKE tells
        return [*self.policy_table.refresh(), *self._ask_sources()]

    def step(self, *events: on.Event) -> list[do.Command]:
        """Take in events, return what to do about them, in order.

        What the kernel told at one go is answered once: an SA comes in several
        notifications, and only their sum says whether it protects. What applications
        ask for comes last: a process that asks much must not hold up what closes a flow.
        """
        events = tuple(sorted(events, key=_is_asked))
        if not all(isinstance(event, on.CallEvent | on.FlowRefused) for event in events):
            self.holds.forget()
        before = self.policies
        commands: list[do.Command] = []
        matters = False
        for at, event in enumerate(events, 1):
            if isinstance(event, _TOLD_TOGETHER):
                matters |= self._hear(event)
                following = events[at] if at < len(events) else None
                if matters and not isinstance(following, _TOLD_TOGETHER):
                    commands += self._follow_kernel()
                    matters = False
                if isinstance(event, on.PolicySet) and self._is_news(event.entry):
                    commands.append(do.AskIke())
            elif isinstance(event, on.CallEvent):
                commands += self.holds.step(event)
            else:
                commands += self._take(event)
        if before is not self.policies:
            self.holds.all_may()
        self.holds.negotiations_moved(self.negotiations.moved())
        return commands + self.holds.settle()

    def _hear(self, event: on.XfrmEvent | on.ChildUp | on.ChildDown) -> bool:
        """Take in what comes with more of its kind; return whether it may matter."""
        match event:
            case on.ChildUp():
                self.protection.child_up(event.sa)
            case on.ChildDown():
                self.protection.userspace_esp.child_down(event.sa)
            case _:
                return self.protection.kernel_state.apply(event)
        return True

    def _take(self, event: on.OtherEvent) -> list[do.Command]:
        match event:
            case on.FlowRefused():
                # Its place is one of the table that refused it, which may be an older one.
                place = None if event.policy is None else self.policy_table.place_of(event.flow)
                return self.ike.ask(event.flow, place) + self.policy_table.refresh()
            case on.KernelSnapshot():
                return self._snapshot(event)
            case on.SourcesResolved():
                return self._sources_resolved(event)
            case on.IkeConnected():
                return self._ike_connected(event)
            case on.TimerFired():
                return self._timer(event.timer) + self.policy_table.refresh()
            case on.CheckDue():
                return [do.Verify(*item) for item in self.hook_tables.tables.items()]
            case on.Reconfigured():
                return self._reconfigure(event.settings)
        return self._ike_event(event)

    def _ike_event(self, event: on.IkeEvent) -> list[do.Command]:
        match event:
            case on.IkeGone():
                return self._ike_gone(event)
            case on.IkeUp() | on.IkeDown() | on.ChildUp() | on.ChildDown():
                return []  # its children are told one by one, and heard together
            case on.IkeUnparsed():
                return [*self.ike.has_unread((event.reason,)), do.AskIke()]
            case on.NegotiationFailed():
                failed = self.negotiations.failed(event.name, event.cause)
                return failed + self.policy_table.refresh()
            case on.NegotiationDone():
                return self.negotiations.done(event.name)

    def _snapshot(self, event: on.KernelSnapshot) -> list[do.Command]:
        drift = self.protection.snapshot(event)
        self.policy_table.look_at_floor()
        text = f"{drift} policies or SAs differed from the kernel's: repaired"
        return [*([do.Log("error", text)] if drift else []), *self._follow_kernel()]

    def _sources_resolved(self, event: on.SourcesResolved) -> list[do.Command]:
        self.protection.resolved(event, self._destinations)
        self._flow_index.reroute()
        self.holds.all_may()
        self._rerouted = True
        sources = tuple(self.protection.sources.items())
        return [do.SetSources(sources), *self._follow_kernel(), *self._adopt()]

    # --- tables -------------------------------------------------------------------

    def _follow_kernel(self) -> list[do.Command]:
        """Bring the SPD table up to date first: opening must not wait for anything.

        Until both the kernel and IKE were heard, a predecessor's table stays in
        force: half the truth would refuse what is covered.
        """
        if not self.protection.is_known(routed=bool(self._destinations)):
            return []
        before = self.hook_tables.live() if self.settings.destroy else set()
        opened = self.hook_tables.spd(self.protection.source)
        concerned = self._concerned()
        lost = [do.CutOff()] if before - self.hook_tables.live() else []
        moved = [
            command
            for name in concerned
            for command in self.negotiations.sa_is(
                name, live=self.protection.is_live(self.negotiations.of[name].flow)
            )
        ]
        return [*self._tell_tun(), *opened, *lost, *moved, *self.policy_table.refresh()]

    def _concerned(self) -> list[ChildName]:
        """Return the negotiations whose flows may be covered or uncovered now.

        Held calls are looked at again for the same reason.
        """
        changed = self.hook_tables.changed
        if changed is None or self._rerouted:
            self._rerouted = False
            self.holds.all_may()
            return list(self.negotiations.of)
        flows = self._flow_index.within(changed)
        self.holds.these_may(flows)
        return self.negotiations.names(flows)

    def _tell_tun(self) -> list[do.Command]:
        """What goes into the daemon's own device is not in clear, if it is the daemon's."""
        tun = self.protection.tun
        before, self._last_tun = self._last_tun, tun
        return [do.SetTun(tun)] if tun != before else []

    def _is_news(self, entry: SpdEntry) -> bool:
        """Tell whether a kernel policy may belong to a connection that is not known yet.

        A trap may: it names no SA.
        """
        if entry.action is not Action.PROTECT or entry.key.direction is not Direction.OUT:
            return False
        return not all(template.spi for template in entry.templates) or not self._cover.contains(
            as_prefix(entry.key.selector.dst)
        )

    def _ask_sources(self) -> list[do.Command]:
        wanted = self.policy_table.networks(self.settings)
        if wanted == self._destinations or self._next is not None:
            return []
        return [self._resolve(wanted)]

    def _resolve(self, destinations: tuple[Network, ...]) -> do.Command:
        self._destinations, self._cover = destinations, PrefixSet(destinations)
        return do.ResolveSources(destinations)

    def is_cut_off(self, flow: Flow) -> bool:
        """Tell whether a flow that stands must be protected, and is not."""
        place = self.policy_table.place_of(flow)
        return place is not None and self._must_wait(flow, self.policies[place])

    # --- held calls -----------------------------------------------------------------

    def _state_of(self, flow: Flow) -> tuple[list[do.Command], FlowState, ChildName | None]:
        """Return what a flow can expect, and have the SA negotiated that it needs."""
        if TableId.POLICY not in self.hook_tables.tables and not self.settings.audit:
            # The hooks refuse everything until the policies are known.
            return [], FlowState.IDLE, None
        place = self.policy_table.place_of(flow)
        if place is None or not self._must_wait(flow, self.policies[place]):
            return [], FlowState.FREE, None
        asked = self.ike.ask(flow, place)
        config = self.ike.child(flow, self.policies[place])
        name = config.name if config else None
        item = self.negotiations.of.get(name) if name else None
        refreshed = [*asked, *self.policy_table.refresh()] if asked else []
        if item is not None and item.coverage is Coverage.BACK_OFF:
            return refreshed, FlowState.FAILED, name
        pending = item is not None and item.coverage is Coverage.NEGOTIATING
        return refreshed, FlowState.PENDING if pending else FlowState.IDLE, name

    def _must_wait(self, flow: Flow, policy: Policy) -> bool:
        """Tell whether the hooks would refuse a flow, for want of an SA alone."""
        if self.settings.audit or policy.action is not Action.PROTECT or is_exempt(flow):
            return False
        return self.protection.source_of(flow) != flow.daddr and not self.protection.is_live(flow)

    def _timer(self, timer: on.Timer) -> list[do.Command]:
        """Let the negotiation go on; delete what IKE believes in and no flow can use, or half.

        Where somebody emptied the kernel's databases, IKE would answer for ever that
        the child is up.
        """
        name = timer.name
        if timer.kind == "one-way":
            return self._one_way.timer(name, self._halved())
        item = self.negotiations.of.get(name)
        stale: list[ChildSa] = []
        if item is not None and item.said_up and item.coverage is Coverage.NEGOTIATING:
            stale = self.protection.stale(name, item.flow)
        moved = self.negotiations.timer(timer)
        if timer.kind != "limit":
            return moved
        return [*(do.Terminate(name, sa.unique) for sa in stale), *moved]

    # --- the configuration ------------------------------------------------------------

    def _reconfigure(self, settings: Settings) -> list[do.Command]:
        """Take over a configuration, once the sources are known that its policies need.

        Until then the old one is in force: what an SA covers would be refused for want
        of its source.
        """
        self._next = settings
        derived = [] if settings.policies else self.policy_table.derived.learn(self.ike.children)
        wanted = self.policy_table.networks(settings)
        union = tuple(dict.fromkeys((*self._destinations, *wanted)))
        if union == self._destinations:
            return [*derived, *self._adopt()]
        return [*derived, self._resolve(union)]

    def _adopt(self) -> list[do.Command]:
        """Put the next configuration in force if its sources are known: the stricter part first."""
        old, new, known = self.settings, self._next, PrefixSet(self.protection.sources)
        if new is None or not all(
            known.overlaps(as_prefix(network)) for network in self.policy_table.networks(new)
        ):
            return []
        self._next, self.policy_table.settings = None, new
        self.holds.errnos = new.errnos
        self.holds.all_may()
        self.ike.warn_anew()
        error = new.errnos.uncovered
        return [
            do.SetModes(old.audit and new.audit, old.deny or new.deny, error),
            *self.policy_table.refresh(),
            do.SetModes(new.audit, new.deny, error),
            *self._ask_sources(),
            do.AskIke(),  # what is to be initiated at once
            do.Adopted(),
        ]

    # --- the IKE daemon -------------------------------------------------------------

    def _ike_connected(self, event: on.IkeConnected) -> list[do.Command]:
        news: list[do.Command] = []
        before = self.ike.error, self.protection.sa_source
        if self.ike.error:
            news = [
                do.ExemptIke(event.pid),
                do.Log("info", f"connected to the IKE daemon, pid {event.pid}"),
            ]
        if self.settings.sa_source is SaSource.AUTO:
            self.protection.sa_source = SaSource.VICI if event.userspace_esp else SaSource.XFRM
        elif self.ike.error and event.userspace_esp != self.protection.in_userspace:
            esp = f"{'strongSwan' if event.userspace_esp else 'the kernel'} does ESP"
            news.append(
                do.Log("warning", f"gate.sa_source is {self.settings.sa_source.value!r}, but {esp}")
            )
        if self.ike.has_loaded(event.children) or self.ike.error:
            self.holds.all_may()
        self.holds.idle_may()
        self.ike.error = ""
        news += self.ike.has_unread(event.unread)
        self.ike.unread = event.unread
        matters = self.protection.ike_connected(event)
        matters |= before != (self.ike.error, self.protection.sa_source)
        if not self.settings.policies:
            news += self.policy_table.derived.learn(event.children)
        follow = self._follow_kernel() if matters else []  # it is looked at often
        halves = self._one_way.look(event.established, self._halved())
        asked = [*self._ask_sources(), *self.ike.ask_again()]
        return [*news, *follow, *halves, *asked, *self.policy_table.refresh()]

    def _halved(self) -> set[ChildSa]:
        """Return the children to be made anew: what must be protected has no use of them."""
        if self.settings.audit:
            return set()
        known = PrefixSet(self.policy_table.networks(self.settings))
        return {
            sa
            for sa in self.protection.one_way_children()
            if any(known.overlaps(as_prefix(there.network)) for there in sa.remote)
        }

    def _ike_gone(self, event: on.IkeGone) -> list[do.Command]:
        news, self.ike.error = event.reason != self.ike.error, event.reason
        self.protection.hears(event)
        if not news:
            return []
        self.protection.ike_gone()
        follow = self._follow_kernel()
        gone = do.Log("error", f"no IKE daemon ({event.reason}): protected flows are refused")
        return [
            *follow,
            do.ExemptIke(0),
            gone,
            *self.negotiations.ike_gone(),
            *self.policy_table.refresh(),
        ]


# Several come at one go, and only their sum says what is protected.
_TOLD_TOGETHER = on.XfrmEvent | on.ChildUp | on.ChildDown


def _is_asked(event: on.Event) -> bool:
    return isinstance(event, on.FlowRefused | on.CallMade)
