"""The negotiations that the gate asked IKE for: one for each child, however many flows need it.

Each change returns an `Outcome`: the commands, and which children and policies it affects.

Source: US 7,028,332 claim 1 (a negotiation component negotiates with the parameters of the policy
that covers the flow).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.coverage import Coverage, Input, advance
from ipsecgate.core.gate.routing import Routed
from ipsecgate.core.model.events import Timer
from ipsecgate.core.model.flow import Flow
from ipsecgate.core.model.ipsec import ChildName
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.tables.flow_index import FlowIndex

LIMIT = 30.0  # seconds for one negotiation
GRACE = 1.0  # seconds more: for IKE to report its end, or for the kernel to show the SA
BACK_OFF_FIRST = 1.0  # seconds
BACK_OFF_LAST = 60.0


@dataclass
class Negotiation:
    """One child's state, and the flow that shows whether the child is covered."""

    flow: Flow
    place: int  # of the policy that asked
    policy: str  # its name
    coverage: Coverage = Coverage.UNCOVERED
    attempts: int = 0
    failures: int = 0  # in a row
    reported_up: bool = False  # by IKE; the kernel has yet to show the SA
    last_error: str = ""


@dataclass(slots=True)
class Outcome:
    """The commands to carry out, and what else has changed."""

    commands: list[do.Command] = field(default_factory=list)
    children: set[ChildName] = field(default_factory=set)  # whose coverage changed
    # Policies whose errno may change: the coverages of the children that each asked for, by place.
    coverages: dict[int, set[Coverage]] = field(default_factory=dict)

    def add(self, other: Outcome) -> None:
        """Append what happened next."""
        self.commands += other.commands
        self.children |= other.children
        self.coverages |= other.coverages


class Negotiations:
    """Every child that a policy in force ever asked for. `spread`: 0 to 1 at random."""

    def __init__(self, flow_index: FlowIndex, spread: Callable[[], float]) -> None:
        self.by_child: dict[ChildName, Negotiation] = {}
        self._flow_index = flow_index
        self._spread = spread
        self._by_flow: dict[Flow, set[ChildName]] = {}
        self._by_place: dict[int, set[ChildName]] = {}

    # --- read -------------------------------------------------------------------------

    def coverage(self, name: ChildName | None) -> Coverage:
        """Return the coverage of a child; UNCOVERED for one that was never asked for."""
        item = self.by_child.get(name) if name is not None else None
        return Coverage.UNCOVERED if item is None else item.coverage

    def judged_by(self, flows: Iterable[Flow]) -> list[ChildName]:
        """Return the children whose coverage depends on one of these flows."""
        return sorted(name for flow in flows for name in self._by_flow.get(flow, ()))

    def coverages(self, place: int) -> set[Coverage]:
        """Return the coverages of the children that a policy asked for."""
        return {self.by_child[name].coverage for name in self._by_place.get(place, ())}

    def coverages_by_place(self) -> dict[int, set[Coverage]]:
        """Return the same for every policy that asked."""
        return {place: self.coverages(place) for place in self._by_place}

    def unconfirmed(self, timer: Timer) -> Flow | None:
        """Return the flow of a child that IKE reports up, if its timer ends the wait for the SA."""
        item = self.by_child.get(timer.name)
        if item is None or timer.kind != "limit" or item.coverage is not Coverage.NEGOTIATING:
            return None
        return item.flow if item.reported_up else None

    # --- change -----------------------------------------------------------------------

    def ask(self, name: ChildName, flow: Flow, routed: Routed, policy: tuple[int, str]) -> Outcome:
        """Start a child's negotiation for a refused flow, unless it is under way or has failed.

        `routed`: the flow as the kernel looks it up. `policy`: place and name of the one that asks.
        """
        item = self.by_child.get(name)
        if item is not None and item.coverage is not Coverage.UNCOVERED:
            return self._advance(name, Input.ASKED)
        place, text = policy
        if item is None:
            former = place
            self.by_child[name] = Negotiation(flow, place, text)
        else:
            former = item.place
            self._remove(name)
            item.flow, item.place, item.policy = flow, place, text
        self._flow_index.add(flow, routed.lookups)
        self._by_flow.setdefault(flow, set()).add(name)
        self._by_place.setdefault(place, set()).add(name)
        outcome = self._advance(name, Input.ASKED)
        if former != place:
            outcome.coverages[former] = self.coverages(former)
        return outcome

    def set_live(self, live: Mapping[ChildName, bool]) -> Outcome:
        """Apply which of these children's flows a live SA protects now."""
        outcome = Outcome()
        for name, is_live in live.items():
            if is_live != (self.by_child[name].coverage is Coverage.COVERED):
                outcome.add(self._advance(name, Input.SA_LIVE if is_live else Input.SA_LOST))
        return outcome

    def failed(self, name: ChildName, cause: str) -> Outcome:
        """Back off: IKE reports a failure, or took too long."""
        if name not in self.by_child:
            return Outcome()
        self.by_child[name].last_error = cause
        return self._advance(name, Input.FAILED)

    def done(self, name: ChildName) -> Outcome:
        """Give the kernel `GRACE` to show the SA that IKE reports up."""
        if self.coverage(name) is not Coverage.NEGOTIATING:
            return Outcome()
        self.by_child[name].reported_up = True
        return Outcome([do.AskIke(), do.StartTimer(Timer("limit", name), GRACE)])

    def timer_fired(self, timer: Timer) -> Outcome:
        """End a negotiation at its limit, or a back-off."""
        name, coverage = timer.name, self.coverage(timer.name)
        if timer.kind == "limit" and coverage is Coverage.NEGOTIATING:
            item = self.by_child[name]
            if item.reported_up:
                cause = f"strongSwan reports it as up, but no SA protects {item.flow}"
            else:
                cause = f"strongSwan did not finish within {LIMIT:.0f} s"
            return self.failed(name, cause)
        if timer.kind == "retry" and coverage is Coverage.BACK_OFF:
            return self._advance(name, Input.RETRY)
        return Outcome()

    def ike_gone(self) -> Outcome:
        """End every negotiation: no daemon carries it on."""
        outcome = Outcome()
        for name in self.by_child:
            outcome.add(self._advance(name, Input.IKE_GONE))
        return outcome

    def renumber(
        self, places: Mapping[ChildName, int | None], policies: Sequence[Policy]
    ) -> Outcome:
        """Apply the places that the negotiations' policies have now; drop those without one."""
        outcome = Outcome()
        self._by_place.clear()
        for name, place in places.items():
            item = self.by_child[name]
            if place is not None:
                item.place, item.policy = place, policies[place].name
                self._by_place.setdefault(place, set()).add(name)
                continue
            self._remove(name)
            del self.by_child[name]
            outcome.children.add(name)
            outcome.commands += [
                do.StopTimer(Timer("limit", name)),
                do.StopTimer(Timer("retry", name)),
            ]
        return outcome

    # --- one transition -----------------------------------------------------------------

    def _remove(self, name: ChildName) -> None:
        """Take a child out of the indexes."""
        item = self.by_child[name]
        self._flow_index.discard(item.flow)
        self._by_flow[item.flow].discard(name)
        if not self._by_flow[item.flow]:
            del self._by_flow[item.flow]
        here = self._by_place.get(item.place, set())
        here.discard(name)
        if not here:
            self._by_place.pop(item.place, None)

    def _advance(self, name: ChildName, event: Input) -> Outcome:
        item = self.by_child[name]
        before, item.coverage = item.coverage, advance(item.coverage, event)
        if before is item.coverage:
            return Outcome()
        commands = self._enter(name, item, event)
        return Outcome(commands, {name}, {item.place: self.coverages(item.place)})

    def _enter(self, name: ChildName, item: Negotiation, event: Input) -> list[do.Command]:
        """Count, and return the commands of the state that `event` led to."""
        limit, retry = Timer("limit", name), Timer("retry", name)
        match item.coverage:
            case Coverage.NEGOTIATING:
                item.attempts += 1
                item.reported_up = False
                return [
                    do.Initiate(name, limit=LIMIT),
                    do.StartTimer(limit, LIMIT + GRACE),
                    do.Log("info", f"{name}: negotiating for {item.flow}"),
                ]
            case Coverage.BACK_OFF:
                item.failures += 1
                pause = self._pause(item.failures)
                return [
                    do.StopTimer(limit),
                    do.StartTimer(retry, pause),
                    do.Log("warning", f"{name}: {item.last_error}; retry in {pause:.1f} s"),
                ]
            case Coverage.COVERED:
                item.failures, item.last_error = 0, ""
            case Coverage.UNCOVERED:
                pass
        log = do.Log("info", f"{name}: {item.coverage.value} ({event.value})")
        return [do.StopTimer(limit), do.StopTimer(retry), log]

    def _pause(self, failures: int) -> float:
        """Return seconds: exponential, and spread so that many gates don't ask a peer at once."""
        pause = min(BACK_OFF_LAST, BACK_OFF_FIRST * 2.0 ** (failures - 1))
        return float(pause * (0.75 + self._spread() / 2))
