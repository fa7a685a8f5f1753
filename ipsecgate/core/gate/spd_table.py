"""The SPD table: the flows that a live SA protects, as published to the hooks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.routing import Routing
from ipsecgate.core.gate.services import Services
from ipsecgate.core.model.flow import Flow
from ipsecgate.core.model.nat import Service
from ipsecgate.core.model.problem import Problem
from ipsecgate.core.state.kernel_state import KernelState
from ipsecgate.core.state.spd import OPEN
from ipsecgate.core.state.userspace_esp import UserspaceEsp
from ipsecgate.core.tables.layout import Entry, State, TableId, flow_key
from ipsecgate.core.tables.rule_table import Difference, RuleTable, join_names
from ipsecgate.core.tables.table import Rule, Table, Ternary

POLICIES_PER_UPDATE = 128  # kernel policies whose rules are made before other work gets a turn
Differences = dict[Ternary, Difference]


class SpdTable:
    """The published table; `content` is None until it is published.

    A large change is published in parts. Half of it might open a flow that it opens neither before
    nor after, so all parts but the last only close flows. What else has changed waits for the last.

    Kernel policies and CHILD_SAs whose rules do not fit are closed (`core.tables.rule_table`);
    `errors` names them.
    """

    def __init__(self) -> None:
        self.content: Table | None = None
        self.errors: list[Problem] = []
        # Regions that the last update may have changed; None: unknown, it may be any flow.
        self.changed: list[Ternary] | None = []
        self.lost = False  # whether it left flows without the SA that they had
        self._rules = {kind: RuleTable(_close) for kind in (KernelState, UserspaceEsp)}
        self._waiting: dict[Ternary, Entry | None] = {}  # as the hooks have them
        self._waiting_table = Table()  # the same; DEAD stands for None
        self._withheld = False  # whether anything waits
        self.has_more = False  # whether closed rules wait to be tried again

    def update(
        self,
        source: KernelState | UserspaceEsp,
        services: tuple[Services, Routing] | None = None,
        *,
        between: bool = False,
    ) -> list[do.Command]:
        """Publish changed rules of `source`; more are left to publish if it is still `pending`.

        `services`: service addresses, and how their flows are routed. `between`: the source is
        about to change further, and only then right.
        """
        rules = self._rules[type(source)]
        for owner, its in source.changed_rules(POLICIES_PER_UPDATE):
            rules.assign(owner, its, source.peer_of(owner))
        if services is not None:
            names, routing = services
            for service, its in names.spd_rules(rules.table, routing):
                rules.assign(service, its)
        self.has_more = rules.retry()
        closed = join_names(rules.closed, lambda owner: _name(source, owner))
        self.errors = [_full(closed)] if closed else []
        changes = rules.changes()
        if self.content is not rules.table:
            if source.pending or between:
                self.changed, self.lost, self._withheld = [], False, True
                return []  # it is not whole yet
            self._withheld = False
            self._waiting, self._waiting_table = {}, Table()
            self.content, self.changed, self.lost = rules.table, None, True
            return [do.Publish(TableId.SPD, self.content)]
        if source.pending or between:
            changes = self._part(changes)
        else:
            changes = self._rest(changes, rules.table)
        self._withheld = bool(self._waiting)
        self.changed = list(changes)
        self.lost = any(before in OPEN and now != before for before, now in _states(changes))
        entries = {match: now for match, (_, now) in changes.items()}
        return [do.Change(TableId.SPD, entries)] if entries else []

    @property
    def is_partial(self) -> bool:
        """Tell whether a part of the last change waits to be published."""
        return self._withheld

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

    def state_of(self, flow: Flow) -> State | None:
        """Return what the table says of a flow, None: nothing; its source must be known."""
        if self.content is None:
            return State.DEAD
        key = flow_key(flow)
        entry, waiting = self.content.classify(key), self._waiting_table.classify(key)
        state = _state(entry)
        if waiting is None or waiting.state is state:
            return state
        return State.PASS if {state, waiting.state} == {State.LIVE, State.PASS} else State.DEAD


def _full(closed: str) -> Problem:
    return Problem(
        f"SPD table: full, so these are refused: {closed}",
        "use fewer prefix lengths and port ranges in the connections",
    )


def _name(source: KernelState | UserspaceEsp, owner: Any) -> str:
    return f"service {owner.daddr}" if isinstance(owner, Service) else source.name_of(owner)


def _states(changes: Differences) -> Iterator[tuple[State | None, State | None]]:
    for before, now in changes.values():
        yield _state(before), _state(now)


def _state(entry: Entry | None) -> State | None:
    return None if entry is None else entry.state


def _closes(before: Entry | None, now: Entry | None) -> bool:
    """Return whether a changed entry opens no flow, whatever the other entries are.

    A live one that goes opens none: the flows that it decided were open. A dead one opens none
    unless it makes way for entries behind it. One that passes flows opens them under a derived
    policy only, so it may open flows when it comes as well as when it goes.
    """
    if now is not None and now.state in OPEN:
        return False
    if before is not None and before.state is State.LIVE:
        return True
    return now is not None and (before is None or now.rank <= before.rank)


def _close(rules: tuple[Rule, ...]) -> list[Rule]:
    """Return a dead rule for a kernel policy's whole region, which is that of its last rule.

    A CHILD_SA of userspace ESP has a region for each pair of selectors. Those that lose their rules
    have no entry, which refuses their flows, too.
    """
    best = min(rule.entry.rank for rule in rules)
    return [Rule(rules[-1].match, Entry(State.DEAD, rank=best))]
