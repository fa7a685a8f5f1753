"""The gate's decisions: events in, commands out.

    FlowRefused      -> which CHILD_SA would protect it? one Initiate each
    XFRM events      -> the SPD table (Publish), or one entry of it (SetEntry)
    ChildUp, -Down   -> the same, where the IKE daemon does ESP itself
    IkeConnected     -> the policy table where none are configured; trust in SAs
    SourcesResolved  -> which source an unbound flow has, hence which policy wins
    Reconfigured     -> what is stricter first, the policy table, what is laxer last
    CallMade         -> held while an SA may come (Hold), then answered (Answer)

Rules of this module: nothing is opened but by the kernel's mirror, or by IKE and
routes where the kernel does no ESP; nothing is decided by time but through timers,
and what cannot be represented is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ipsecgate.core import commands as do
from ipsecgate.core import events as on
from ipsecgate.core.coverage import Coverage
from ipsecgate.core.floor import floor_of, is_floor
from ipsecgate.core.flow import ANY_V4, ANY_V6, Flow, Network, is_exempt
from ipsecgate.core.holds import Holds, Outlook
from ipsecgate.core.ipsec import Action, SpdEntry
from ipsecgate.core.layout import TableId, flow_key
from ipsecgate.core.learned import Learned
from ipsecgate.core.negotiations import Name, Negotiations, child_for
from ipsecgate.core.policy import Policy, SaSource, Settings
from ipsecgate.core.protection import Protection
from ipsecgate.core.published import Published
from ipsecgate.core.sources import Cover, prefix
from ipsecgate.core.table import EMPTY

NOT_KNOWN_YET = (Policy("not-known-yet", (ANY_V4, ANY_V6)),)
ORPHANS = 64  # flows that wait for a connection to be loaded
WARNINGS = 256  # that are told once each


@dataclass
class Gate:
    """The whole state of the controller."""

    settings: Settings
    remembered: tuple[on.ChildConfig, ...] = ()
    negotiations: Negotiations = field(default_factory=Negotiations)

    def __post_init__(self) -> None:
        self.published = Published()
        self.protection = Protection(self.settings.sa_source, self.published)
        self.learned = Learned(self.remembered)
        self.children: tuple[on.ChildConfig, ...] = ()
        self.ike_error = "not connected yet"
        self.holds = Holds(self.settings.errnos, self._outlook)
        self._warned: set[tuple[str, Flow]] = set()
        self._destinations: tuple[Network, ...] = ()
        self._told_tun: int | None = None  # a predecessor may have told another
        self._orphans: set[Flow] = set()  # refused, and no child known
        self._numbered: tuple[Policy, ...] = ()  # by these the negotiations' places count
        self._floor: tuple[Policy, ...] | None = None  # the policies it is under, None: to be told
        self._next: Settings | None = None  # waits for the sources that it needs

    @property
    def policies(self) -> tuple[Policy, ...]:
        """Configured policies, else one for every known remote traffic selector."""
        return self._policies_of(self.settings)

    def _policies_of(self, settings: Settings) -> tuple[Policy, ...]:
        # What was published is only ever replaced, so without policies all of it is protected.
        unknown = NOT_KNOWN_YET if TableId.POLICY in self.published.tables else ()
        return settings.policies or self.learned.policies or unknown

    @property
    def errors(self) -> list[str]:
        """What the operator should mend."""
        userland = self.settings.floor and self.protection.in_userland
        useless = ["gate.floor: has no effect where IKE does ESP itself"] if userland else []
        return [*self.published.errors.values(), *self.learned.errors, *useless]

    def start(self) -> list[do.Command]:
        """Return what makes the hooks refuse what must be protected, from the first moment."""
        if not self.policies:
            return []  # nothing known: the hooks refuse everything until IKE tells
        return [*self._refresh(), *self._ask_sources()]

    def step(self, *events: on.Event) -> list[do.Command]:
        """Take in events, return what to do about them, in order.

        What the kernel told at one go is answered once: an SA comes in several
        notifications, and only their sum says whether it protects. What applications
        ask for comes last: a process that asks much must not hold up what closes a flow.
        """
        events = tuple(sorted(events, key=_is_asked))
        only_calls = all(isinstance(event, on.CallEvent) for event in events)
        if not only_calls:
            self.holds.forget()
        commands: list[do.Command] = []
        for at, event in enumerate(events, 1):
            if isinstance(event, on.XfrmEvent):
                self.protection.mirror.apply(event)
                if not isinstance(events[at] if at < len(events) else None, on.XfrmEvent):
                    commands += self._follow_kernel()
                if isinstance(event, on.PolicySet) and self._is_news(event.entry):
                    commands.append(do.AskIke())
            elif isinstance(event, on.CallEvent):
                commands += self.holds.step(event)
            else:
                commands += self._take(event)
        if not only_calls:
            commands += self.holds.settle()
        return commands

    def _take(self, event: on.OtherEvent) -> list[do.Command]:
        match event:
            case on.FlowRefused():
                # Its place is one of the table that refused it, which may be an older one.
                place = None if event.policy is None else self._place_of(event.flow)
                return self._ask(event.flow, place) + self._refresh()
            case on.KernelSnapshot():
                return self._snapshot(event)
            case on.SourcesResolved():
                return self._sources_resolved(event)
            case on.IkeConnected():
                return self._ike_connected(event)
            case on.TimerFired():
                return self._timer(event.timer) + self._refresh()
            case on.CheckDue():
                return [do.Verify(*item) for item in self.published.tables.items()]
            case on.Reconfigured():
                return self._reconfigure(event.settings)
        return self._ike_event(event)

    def _ike_event(self, event: on.IkeEvent) -> list[do.Command]:
        match event:
            case on.IkeGone():
                return self._ike_gone(event)
            case on.ChildUp():
                self.protection.child_up(event.sa)
                return self._follow_kernel()
            case on.ChildDown():
                self.protection.userland.ike_drops(event.sa)
                return self._follow_kernel()
            case on.IkeUp() | on.IkeDown():
                return []  # its children are told one by one
            case on.NegotiationFailed():
                name = (event.ike, event.child)
                return self.negotiations.failed(name, event.cause) + self._refresh()
            case on.NegotiationDone():
                return self.negotiations.done((event.ike, event.child))

    def _snapshot(self, event: on.KernelSnapshot) -> list[do.Command]:
        drift = self.protection.snapshot(event)
        if self._floor is not None:
            there = sum(is_floor(entry) for entry in self.protection.mirror.policies.values())
            if there < len(floor_of(self._floor)):
                self._floor = None  # somebody emptied the kernel's databases
        text = f"{drift} policies or SAs were not as the kernel has them: mended"
        return [*([do.Log("error", text)] if drift else []), *self._follow_kernel()]

    def _sources_resolved(self, event: on.SourcesResolved) -> list[do.Command]:
        self.protection.resolved(event)
        return [do.SetSources(event.sources), *self._follow_kernel(), *self._adopt()]

    # --- tables -------------------------------------------------------------------

    def _follow_kernel(self) -> list[do.Command]:
        """Bring the SPD table up to date first: opening must not wait for anything.

        Until both the kernel and IKE were heard, a predecessor's table stays in
        force: half the truth would refuse what is covered.
        """
        if not self.protection.is_known(routed=bool(self._destinations)):
            return []
        before = self.published.live() if self.settings.destroy else set()
        opened = self.published.spd(self.protection.source.agreed_rules())
        lost = [do.CutOff()] if before - self.published.live() else []
        moved = [
            command
            for name, item in self.negotiations.of.items()
            for command in self.negotiations.sa_is(name, live=self.protection.is_live(item.flow))
        ]
        return [*self._tell_tun(), *opened, *lost, *moved, *self._refresh()]

    def _tell_tun(self) -> list[do.Command]:
        """What goes into the daemon's own device is not in clear, if it is the daemon's."""
        tun = self.protection.tun
        before, self._told_tun = self._told_tun, tun
        return [do.SetTun(tun)] if tun != before else []

    def _refresh(self) -> list[do.Command]:
        """Bring the policy table up to date: policies, and the errno of their refusals."""
        if not self.policies:
            return []
        told: list[do.Command] = []
        uncovered = self.settings.errnos.uncovered
        if self._numbered != self.policies:
            self._numbered = self.policies
            told = self.published.policies(self.policies, {}, uncovered)
            names = [policy.name for policy in self.policies]
            told += self.negotiations.renumber(self._place_for, names)
        errnos = {place: self._errno(place) for place in self.negotiations.places()}
        told += self.published.policies(self.policies, errnos, uncovered)
        return told + self._keep_floor()

    def _keep_floor(self) -> list[do.Command]:
        """Have the floor follow the policies.

        There is none in audit mode, and none where IKE does ESP itself: it would block that.
        """
        if self.policies is NOT_KNOWN_YET:
            return []
        enforced = self.settings.floor and not self.settings.audit
        under = self.policies if enforced and not self.protection.in_userland else ()
        if under == self._floor:
            return []
        self._floor = under
        return [do.SetFloor(floor_of(under))]

    def _place_of(self, flow: Flow) -> int | None:
        """Return the place of the policy that has a flow now."""
        entry = self.published.tables.get(TableId.POLICY, EMPTY).classify(flow_key(flow))
        return entry.id if entry and entry.id < len(self.policies) else None

    def _place_for(self, name: Name, flow: Flow) -> int | None:
        """Return the place of the policy for which a child may be negotiated, to protect a flow."""
        place = self._place_of(flow)
        if place is None or self.policies[place].action is not Action.PROTECT:
            return None
        return place if self.policies[place].child in (None, name[1], "/".join(name)) else None

    def _is_news(self, entry: SpdEntry) -> bool:
        """Tell whether a kernel policy may belong to a connection that is not known yet.

        A trap may: it names no SA.
        """
        if entry.action is not Action.PROTECT:
            return False
        return not all(template.spi for template in entry.templates) or not any(
            entry.key.selector.dst.version == network.version
            and entry.key.selector.dst.subnet_of(network)  # type: ignore[arg-type]
            for network in self._destinations
        )

    def _errno(self, place: int) -> int:
        errnos = self.settings.errnos
        states = self.negotiations.states(place)
        if Coverage.NEGOTIATING in states:
            return errnos.negotiating
        return errnos.failed if states == {Coverage.BACK_OFF} else errnos.uncovered

    def _ask_sources(self) -> list[do.Command]:
        wanted = _protected(self.policies)
        if wanted == self._destinations or self._next is not None:
            return []
        self._destinations = wanted
        return [do.ResolveSources(wanted)]

    def is_cut_off(self, flow: Flow) -> bool:
        """Tell whether a flow that stands must be protected, and is not."""
        place = self._place_of(flow)
        return place is not None and self._must_wait(flow, self.policies[place])

    def _ask(self, flow: Flow, place: int | None) -> list[do.Command]:
        """Have the child negotiated that would protect a refused flow."""
        if place is None or place >= len(self.policies):
            return []
        policy = self.policies[place]
        if policy.action is not Action.PROTECT or self.ike_error or self.protection.is_live(flow):
            return []
        config = self._child(flow, policy)
        if config is not None:
            if self.protection.is_up(config):
                return self._warn(f"{config.ike}/{config.child} is up and does not protect", flow)
            return self.negotiations.ask((config.ike, config.child), flow, place, policy.name)
        if len(self._orphans) < ORPHANS:
            self._orphans.add(flow)
        return [do.AskIke()]  # the connection may have been loaded a moment ago

    def _child(self, flow: Flow, policy: Policy) -> on.ChildConfig | None:
        return child_for(flow, self.protection.source_of(flow), policy, self.children)

    def _warn(self, text: str, flow: Flow) -> list[do.Command]:
        """Tell something of a flow once."""
        if (text, flow) in self._warned or len(self._warned) >= WARNINGS:
            return []
        self._warned.add((text, flow))
        return [do.Log("warning", f"{text} {flow}")]

    # --- held calls -----------------------------------------------------------------

    def _outlook(self, flow: Flow) -> tuple[list[do.Command], Outlook]:
        """Return what a flow can expect, and have the SA negotiated that it needs."""
        if TableId.POLICY not in self.published.tables and not self.settings.audit:
            return [], Outlook.PENDING  # the hooks refuse everything until the policies are known
        place = self._place_of(flow)
        if place is None or not self._must_wait(flow, self.policies[place]):
            return [], Outlook.FREE
        asked = self._ask(flow, place)
        config = self._child(flow, self.policies[place])
        item = self.negotiations.of.get((config.ike, config.child)) if config else None
        failed = item is not None and item.coverage is Coverage.BACK_OFF
        refreshed = [*asked, *self._refresh()] if asked else []
        return refreshed, Outlook.FAILED if failed else Outlook.PENDING

    def _must_wait(self, flow: Flow, policy: Policy) -> bool:
        """Tell whether the hooks would refuse a flow, for want of an SA alone."""
        if self.settings.audit or policy.action is not Action.PROTECT or is_exempt(flow):
            return False
        return self.protection.source_of(flow) != flow.daddr and not self.protection.is_live(flow)

    def _timer(self, timer: on.Timer) -> list[do.Command]:
        """Let the negotiation go on; delete what IKE believes in and no flow can use.

        Where somebody emptied the kernel's databases, IKE would answer for ever that
        the child is up.
        """
        name = (timer.ike, timer.child)
        item = self.negotiations.of.get(name)
        stale = (
            item is not None
            and item.said_up
            and item.coverage is Coverage.NEGOTIATING
            and self.protection.is_stale(name, item.flow)
        )
        moved = self.negotiations.timer(timer)
        return [do.Terminate(*name), *moved] if stale and timer.kind == "limit" else moved

    def _ask_again(self) -> list[do.Command]:
        """Ask for the flows that had no child when the daemon was last looked at."""
        orphans, self._orphans = self._orphans, set()
        asked = [c for flow in orphans for c in self._ask(flow, self._place_of(flow))]
        alone, self._orphans = self._orphans, set()
        text = "no CHILD_SA that is loaded would protect"
        told = [command for flow in alone for command in self._warn(text, flow)]
        return [c for c in asked if not isinstance(c, do.AskIke)] + told

    # --- the configuration ------------------------------------------------------------

    def _reconfigure(self, settings: Settings) -> list[do.Command]:
        """Take over a configuration, once the sources are known that its policies need.

        Until then the old one is in force: what an SA covers would be refused for want
        of its source.
        """
        self._next = settings
        learned = [] if settings.policies else self.learned.learn(self.children)
        wanted = _protected(self._policies_of(settings))
        union = tuple(dict.fromkeys((*self._destinations, *wanted)))
        if union == self._destinations:
            return [*learned, *self._adopt()]
        self._destinations = union
        return [*learned, do.ResolveSources(union)]

    def _adopt(self) -> list[do.Command]:
        """Put the next configuration in force if its sources are known: the stricter part first."""
        old, new, known = self.settings, self._next, Cover(self.protection.sources)
        if new is None or not all(
            known.touches(prefix(network)) for network in _protected(self._policies_of(new))
        ):
            return []
        self._next, self.settings = None, new
        self.holds.errnos = new.errnos
        self._warned.clear()
        error = new.errnos.uncovered
        return [
            do.SetModes(old.audit and new.audit, old.deny or new.deny, error),
            *self._refresh(),
            do.SetModes(new.audit, new.deny, error),
            *self._ask_sources(),
            do.AskIke(),  # what is to be initiated at once
            do.Adopted(),
        ]

    # --- the IKE daemon -------------------------------------------------------------

    def _ike_connected(self, event: on.IkeConnected) -> list[do.Command]:
        news: list[do.Command] = []
        if self.ike_error:
            news = [do.ExemptIke(event.pid), do.Log("info", f"IKE daemon {event.pid} connected")]
        if self.settings.sa_source is SaSource.AUTO:
            self.protection.sa_source = SaSource.VICI if event.userland else SaSource.XFRM
        elif self.ike_error and event.userland != self.protection.in_userland:
            esp = "does ESP itself" if event.userland else "has the kernel do ESP"
            news.append(
                do.Log("warning", f"sa_source = {self.settings.sa_source.value!r}, but IKE {esp}")
            )
        self.ike_error = ""
        self.children = event.children
        self.protection.ike_connected(event)
        if not self.settings.policies:
            news += self.learned.learn(event.children)
        follow = self._follow_kernel()
        started = [
            command
            for place, policy in enumerate(self.policies)
            if policy.start
            for command in self._ask(policy.any_flow(), place)
            if not isinstance(command, do.AskIke)  # this is the answer
        ]
        asked = [*started, *self._ask_again()]
        return [*news, *follow, *self._ask_sources(), *asked, *self._refresh()]

    def _ike_gone(self, event: on.IkeGone) -> list[do.Command]:
        news, self.ike_error = event.reason != self.ike_error, event.reason
        self.protection.hears(event)
        if not news:
            return []
        self.protection.ike_gone()
        follow = self._follow_kernel()
        gone = do.Log("error", f"IKE daemon gone ({event.reason}): protected flows are refused")
        return [*follow, do.ExemptIke(0), gone, *self.negotiations.ike_gone(), *self._refresh()]


def _protected(policies: Iterable[Policy]) -> tuple[Network, ...]:
    """Return the networks whose sources must be known."""
    protect = (policy for policy in policies if policy.action is Action.PROTECT)
    return tuple(dict.fromkeys(network for policy in protect for network in policy.remote))


def _is_asked(event: on.Event) -> bool:
    return isinstance(event, on.FlowRefused | on.CallMade)
