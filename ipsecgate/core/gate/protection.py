"""Which flows are protected now: the SAs, the routes to them, and the SPD table made of both.

    Sources      the source address of unbound flows, as routing chooses it
    SpdTable     the flows that a live SA protects, as published to the hooks
    Protection   both, and the SAs: the kernel's and the IKE daemon's

Where the IKE daemon does ESP itself, its SAs count, else the kernel's. Both are kept up to date,
because only the connected daemon shows which.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from ipsecgate.core.gate import commands as do
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import Address, Flow, Network
from ipsecgate.core.model.ipsec import (
    Action,
    ChildConfig,
    ChildName,
    ChildSa,
    Direction,
    SpdEntry,
)
from ipsecgate.core.model.policy import SaSource
from ipsecgate.core.model.prefixes import LongestPrefix, PrefixSet, as_prefix, limit_sources
from ipsecgate.core.state.kernel_state import KernelState
from ipsecgate.core.state.userspace_esp import UserspaceEsp
from ipsecgate.core.tables.layout import SOURCES, Entry, State, TableId, flow_key
from ipsecgate.core.tables.rule_table import Difference, RuleTable, join_names
from ipsecgate.core.tables.table import Rule, Table, Ternary

POLICIES_PER_UPDATE = 500  # kernel policies whose rules are made before other work gets a turn
Differences = dict[Ternary, Difference]
NAMED = 8  # destinations whose sources do not fit, and that are reported


class Sources:
    """The source address of an unbound socket, by destination.

    An unbound flow has no source at connect(), but the SPD lookup needs one. So the controller
    resolves it for every network that must be protected, and again whenever routes change. A flow
    is refused while its source is unknown.
    """

    def __init__(self) -> None:
        self.destinations: tuple[Network, ...] = ()
        self.by_network: dict[Network, Address | None] = {}
        self.errors: list[str] = []
        self._covered = PrefixSet(())  # the destinations
        self._longest: LongestPrefix[Address | None] = LongestPrefix(())

    def follow(self, destinations: tuple[Network, ...]) -> list[do.Command]:
        """Have the sources for these destinations resolved, unless they already are."""
        if destinations == self.destinations:
            return []
        self.destinations, self._covered = destinations, PrefixSet(destinations)
        return [do.ResolveSources(destinations)]

    def resolved(self, event: on.SourcesResolved) -> list[do.Command]:
        """Apply the resolved sources, and pass them on to the hooks.

        If they are more than the hooks' table holds, those of some destinations stay unknown.
        """
        sources, lost = limit_sources(event.sources, self.destinations, SOURCES)
        self.by_network = dict(sources)
        self._longest = LongestPrefix(sources)
        self.errors = [
            f"{network}: routing divides it into more parts than the hooks can hold ({SOURCES}): "
            "requests to it from sockets without a bound address are refused"
            for network in lost[:NAMED]
        ]
        return [do.SetSources(tuple(self.by_network.items()))]

    def route(self, flow: Flow) -> Flow:
        """Return a bound flow as it is, an unbound one with the source that routing would choose.

        The source is None if it is unknown.
        """
        if flow.saddr is not None:
            return flow
        return replace(flow, saddr=next(self._longest.containing(flow.daddr), (None, None))[1])

    def are_known(self, networks: Iterable[Network]) -> bool:
        """Tell whether something was resolved for each of these networks."""
        known = PrefixSet(self.by_network)
        return all(known.overlaps(as_prefix(network)) for network in networks)

    def follows(self, network: Network) -> bool:
        """Tell whether a network lies within the destinations."""
        return self._covered.contains(as_prefix(network))


class SpdTable:
    """The published table; `content` is None until it is published.

    A large change is published in parts. Half of it might open a flow that it opens neither before
    nor after, so all parts but the last only close flows. What else has changed waits for the last.

    Kernel policies and CHILD_SAs whose rules do not fit are closed (`core.tables.rule_table`);
    `errors` names them.
    """

    def __init__(self) -> None:
        self.content: Table | None = None
        self.errors: list[str] = []
        # Regions that the last update may have changed; None: unknown, it may be any flow.
        self.changed: list[Ternary] | None = []
        self.lost = False  # whether it left flows without the SA that they had
        self._rules = {kind: RuleTable(_close) for kind in (KernelState, UserspaceEsp)}
        self._waiting: dict[Ternary, Entry | None] = {}  # as the hooks have them
        self._waiting_table = Table()  # the same; DEAD stands for None

    def update(self, source: KernelState | UserspaceEsp) -> list[do.Command]:
        """Publish changed rules of `source`; more are left to publish if it is still `pending`."""
        rules = self._rules[type(source)]
        for owner, its in source.changed_rules(POLICIES_PER_UPDATE):
            rules.assign(owner, its, source.peer_of(owner))
        closed = join_names(rules.closed, source.name_of)
        self.errors = [f"SPD table: full, so these are refused: {closed}"] if closed else []
        changes = rules.changes()
        if self.content is not rules.table:
            if source.pending:
                self.changed, self.lost = [], False
                return []  # it is not whole yet
            self._waiting, self._waiting_table = {}, Table()
            self.content, self.changed, self.lost = rules.table, None, True
            return [do.Publish(TableId.SPD, self.content)]
        changes = self._part(changes) if source.pending else self._rest(changes, rules.table)
        self.changed = list(changes)
        self.lost = any(_is_live(before) and not _is_live(now) for before, now in changes.values())
        entries = {match: now for match, (_, now) in changes.items()}
        return [do.Change(TableId.SPD, entries)] if entries else []

    @property
    def is_partial(self) -> bool:
        """Tell whether a part of the last change waits to be published."""
        return bool(self._waiting)

    def _part(self, changes: Differences) -> Differences:
        """Return those of a change's entries that may be published before the rest of it."""
        part: Differences = {}
        for match, (before, now) in self._take_waiting(changes):
            if _closes(before, now):
                part[match] = before, now
                continue
            self._waiting[match] = before
            shown = before or (now and replace(now, state=State.DEAD))
            self._waiting_table.put(match, shown)
        return part

    def _rest(self, changes: Differences, table: Table) -> Differences:
        """Return all that has yet to be published, once the whole change is known."""
        rest = dict(self._take_waiting(changes))
        rest |= {match: (old, table.get(match)) for match, old in self._waiting.items()}
        self._waiting, self._waiting_table = {}, Table()
        return rest

    def _take_waiting(self, changes: Differences) -> Iterator[tuple[Ternary, Difference]]:
        """Yield a change as it looks from what is published."""
        for match, (before, now) in changes.items():
            published = self._waiting.pop(match, before)
            if self._waiting_table.size:
                self._waiting_table.put(match, None)
            if published != now:
                yield match, (published, now)

    def is_live(self, flow: Flow) -> bool:
        """Tell whether a live SA protects a flow; its source must be known."""
        if self.content is None:
            return False
        key = flow_key(flow)
        published = self._waiting_table.classify(key)
        return _is_live(self.content.classify(key)) and (published is None or _is_live(published))


def _is_live(entry: Entry | None) -> bool:
    return entry is not None and entry.state is State.LIVE


def _closes(before: Entry | None, now: Entry | None) -> bool:
    """Return whether a changed entry opens no flow, whatever the other entries are.

    A live one that goes opens none: the flows that it decided were open. A dead one opens none
    unless it makes way for entries behind it.
    """
    if _is_live(now):
        return False
    if _is_live(before):
        return True
    return now is not None and (before is None or now.rank <= before.rank)


def _close(rules: tuple[Rule, ...]) -> list[Rule]:
    """Return a dead rule for a kernel policy's whole region, which is that of its last rule.

    A CHILD_SA of userspace ESP has a region for each pair of selectors. Those that lose their rules
    have no entry, which refuses their flows, too.
    """
    best = min(rule.entry.rank for rule in rules)
    return [Rule(rules[-1].match, Entry(State.DEAD, rank=best))]


StateEvent = on.XfrmEvent | on.ChildUp | on.ChildDown
"""Events that change what the kernel or IKE says is protected. One SA causes several of them."""


class Protection:
    """The kernel's and the daemon's SAs, the sources of unbound flows, and the SPD table."""

    def __init__(self, configured: SaSource) -> None:
        self.kernel_state = KernelState()
        self.userspace_esp = UserspaceEsp()
        self.sources = Sources()
        self.spd_table = SpdTable()
        self.sa_source = configured  # with AUTO, the daemon's as soon as it is connected
        self.drift = 0  # policies and SAs that dumps showed and notifications had not
        self._configured = configured
        self._tun = 0
        self._published_tun: int | None = None  # a predecessor may have set another
        self._heard: set[type[on.Event]] = set()

    @property
    def source(self) -> KernelState | UserspaceEsp:
        """Return the one that knows the live SAs."""
        return self.userspace_esp if self.sa_source is SaSource.VICI else self.kernel_state

    @property
    def in_userspace(self) -> bool:
        """Tell whether the IKE daemon does ESP itself."""
        return self.source is self.userspace_esp

    @property
    def errors(self) -> list[str]:
        """Return the problems that the operator should fix."""
        return [*self.spd_table.errors, *self.sources.errors]

    # --- events in ------------------------------------------------------------------

    def notified(self, event: StateEvent) -> bool:
        """Apply one notification; return whether it may change what is protected."""
        match event:
            case on.ChildUp():
                self.kernel_state.child_up(event.sa)
                self.userspace_esp.child_up(event.sa)
            case on.ChildDown():
                self.userspace_esp.child_down(event.sa)
            case _:
                return self.kernel_state.apply(event)
        return True

    def snapshot(self, event: on.KernelSnapshot) -> int:
        """Apply a dump; return in how many policies and SAs it differs from what should be known.

        0 for a dump that is not a check: it follows lost notifications, so differences are normal.
        """
        self._heard.add(on.KernelSnapshot)
        difference = self.kernel_state.replace(event)
        drift = difference if event.check else 0
        self.drift += drift
        return drift

    def resolved(self, event: on.SourcesResolved) -> list[do.Command]:
        """Apply the routes: sources for the hooks, and destinations behind the daemon's device."""
        self._heard.add(on.SourcesResolved)
        self._tun = event.tun
        self.userspace_esp.routed(event.into_tun)
        return self.sources.resolved(event)

    def ike_connected(self, event: on.IkeConnected) -> bool:
        """Apply the daemon's list of established SAs; return whether anything is new."""
        self._heard.add(on.IkeConnected)
        before = self.sa_source
        if self._configured is SaSource.AUTO:
            self.sa_source = SaSource.VICI if event.userspace_esp else SaSource.XFRM
        kernel = self.kernel_state.ike_connected(event.established)
        daemon = self.userspace_esp.ike_connected(event.established)
        return kernel or daemon or before is not self.sa_source

    def ike_gone(self) -> None:
        """Stop trusting any SA: no daemon confirms it."""
        self._heard.add(on.IkeGone)
        self.kernel_state.ike_gone()
        self.userspace_esp.ike_gone()

    def may_be_unknown(self, entry: SpdEntry) -> bool:
        """Tell whether a kernel policy may belong to a connection that was loaded just now.

        A policy outside all known destinations may, and a trap, which names no SPI.
        """
        if entry.action is not Action.PROTECT or entry.key.direction is not Direction.OUT:
            return False
        is_trap = not all(template.spi for template in entry.templates)
        return is_trap or not self.sources.follows(entry.key.selector.dst)

    # --- the SPD table ----------------------------------------------------------------

    @property
    def is_known(self) -> bool:
        """Tell whether everything was heard that decides what is protected.

        With half of it, covered flows would be refused that a predecessor's table lets pass.
        """
        if not self._heard & {on.IkeConnected, on.IkeGone}:
            return False
        if self.sa_source is not SaSource.VICI:
            return on.KernelSnapshot in self._heard
        return not self.sources.destinations or on.SourcesResolved in self._heard

    def publish(self) -> list[do.Command]:
        """Bring the SPD table up to date, and the device that the backstop lets packets into.

        Packets into the daemon's own TUN device are not in clear: the daemon encrypts them.
        """
        tun = self._tun if self.in_userspace else 0
        before, self._published_tun = self._published_tun, tun
        set_tun = [do.SetTun(tun)] if tun != before else []
        return [*set_tun, *self.spd_table.update(self.source)]

    @property
    def pending(self) -> bool:
        """Tell whether `publish` has more to do than it did last time."""
        return self.is_known and self.source.pending

    def is_live(self, flow: Flow) -> bool:
        """Tell whether a live SA protects a flow; never if its source is unknown."""
        routed = self.sources.route(flow)
        return routed.saddr is not None and self.spd_table.is_live(routed)

    # --- CHILD_SAs that need attention ------------------------------------------------

    def is_up(self, config: ChildConfig) -> bool:
        """Tell whether the kernel has a CHILD_SA of this configuration that the daemon lists.

        Then another negotiation changes nothing.
        """
        established = self.kernel_state.established(config.name)
        return not self.in_userspace and any(
            not self.kernel_state.is_missing(sa) for sa in established
        )

    def one_way(self, networks: Iterable[Network]) -> set[ChildSa]:
        """Return the CHILD_SAs towards these networks whose inbound half the kernel has lost."""
        if self.in_userspace:
            return set()
        protected = PrefixSet(networks)
        return {
            sa
            for sa in self.kernel_state.one_way_children()
            if any(protected.overlaps(as_prefix(remote.network)) for remote in sa.remote)
        }

    def stale(self, name: ChildName, flow: Flow) -> list[ChildSa]:
        """Return the CHILD_SAs that should protect a flow, if the kernel has none of them.

        If it has one, that may be the successor in a rekeying, so the result is empty. CHILD_SAs
        whose selectors do not contain the flow, such as those with other peers, are left out.
        """
        remote = flow.daddr, flow.proto, flow.dport
        covering = [
            sa
            for sa in self.source.established(name)
            if any(selector.contains(*remote) for selector in sa.remote)
        ]
        return covering if all(self.source.is_missing(sa) for sa in covering) else []
