"""The negotiations that the gate asked IKE for: one for each child, however many flows need it.

Each change returns an `Outcome`: the commands, and which children and policies it affects.

Source: US 7,028,332 claim 1 (a negotiation component negotiates with the parameters of the policy
that covers the flow).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.coverage import Coverage, Input, advance
from ipsecgate.core.gate.ike import LoadedChildren
from ipsecgate.core.gate.negotiation import Need, Negotiation, Outcome
from ipsecgate.core.model.events import Timer
from ipsecgate.core.model.flow import Flow
from ipsecgate.core.model.ipsec import ChildName
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.model.problem import Cause, Problem
from ipsecgate.core.tables.flow_index import FlowIndex

LIMIT = 30.0  # seconds for one negotiation
LIMIT_WITH_NEXT = 8.0  # seconds, if another child is there to try; IKE sends again after 4 s
GRACE = 1.0  # seconds more: for IKE to report its end, or for the kernel to show the SA
BACK_OFF_FIRST = 1.0  # seconds
BACK_OFF_LAST = 60.0
EVENTS = {Input.SA_LIVE: "negotiated", Input.SA_LOST: "lost"}  # as `do.Log` names them
PARTS = 1024  # of wildcards and narrowed children that are remembered
# What ends a negotiation, and what that is called.
ENDS = {
    Input.SA_LIVE: "established",
    Input.FAILED: "failed",
    Input.NARROWED: "narrowed",
    Input.IKE_GONE: "aborted",
}


class Negotiations:
    """Every child that a policy in force ever asked for. `spread`: 0 to 1 at random."""

    def __init__(self, flow_index: FlowIndex, spread: Callable[[], float]) -> None:
        self.by_child: dict[ChildName, Negotiation] = {}
        self.ended: Counter[tuple[str, str]] = Counter()  # by policy's name and word of `ENDS`
        self._flow_index = flow_index
        self.now = 0.0  # wall clock, seconds since the epoch; see `Gate.step`
        self._spread = spread
        self._by_flow: dict[Flow, set[ChildName]] = {}
        self._by_place: dict[int, set[ChildName]] = {}

    # --- read -------------------------------------------------------------------------

    def coverage(self, name: ChildName | None) -> Coverage:
        """Return the coverage of a child; UNCOVERED for one that was never asked for."""
        item = self.by_child.get(name) if name is not None else None
        return Coverage.UNCOVERED if item is None else item.coverage

    def preferred(self, choices: Iterable[ChildName]) -> ChildName | None:
        """Return which of several children to wait for or to ask; None if there are none.

        The one that is being negotiated; else the first that has not failed a moment ago.
        """
        for wanted in ((Coverage.NEGOTIATING,), (Coverage.UNCOVERED, Coverage.COVERED)):
            for name in choices:
                if self.coverage(name) in wanted:
                    return name
        return next(iter(choices), None)

    def judged_by(self, flows: Iterable[Flow]) -> list[ChildName]:
        """Return the children whose coverage depends on one of these flows."""
        return sorted({n for flow in flows for n in self._by_flow.get(flow, ())}, key=str)

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

    def ask(self, name: ChildName, need: Need) -> Outcome:
        """Start a child's negotiation, unless it is under way or has failed."""
        item = self.by_child.get(name)
        if item is not None and item.coverage is not Coverage.UNCOVERED:
            return self._advance(name, Input.ASKED)
        former = need.place if item is None else item.place
        if item is None:
            self.by_child[name] = Negotiation.of(need)
        else:
            self._remove(name)
            item.asked_for(need)
        self._flow_index.add(need.flow, need.routed.lookups)
        self._by_flow.setdefault(need.flow, set()).add(name)
        self._by_place.setdefault(need.place, set()).add(name)
        outcome = self._advance(name, Input.ASKED)
        if former != need.place:
            outcome.coverages[former] = self.coverages(former)
        return outcome

    def hopeless(self, name: ChildName, need: Need, cause: Cause) -> Outcome:
        """Back off without asking IKE, because it could not help."""
        outcome = self.ask(name, need)
        outcome.commands.clear()
        outcome.add(self.failed(name, cause))
        return outcome

    def is_full(self, name: ChildName) -> bool:
        """Tell whether a part has to be left out; forget the first uncovered one to make space."""
        if name.part is None or name in self.by_child:
            return False
        parts = [known for known in self.by_child if known.part is not None]
        if len(parts) < PARTS:
            return False
        idle = (one for one in parts if self.coverage(one) is Coverage.UNCOVERED)
        unneeded = next(idle, None)
        if unneeded is None:
            return True
        self._forget(unneeded)
        return False

    def narrowed(self, name: ChildName) -> Outcome:
        """End and forget the negotiation of a child whose peer left out the flow that asked."""
        outcome, place = self._advance(name, Input.NARROWED), self.by_child[name].place
        self._forget(name)
        outcome.coverages[place] = self.coverages(place)
        return outcome

    def set_live(self, live: Mapping[ChildName, bool]) -> Outcome:
        """Apply which of these children's flows a live SA protects now.

        Of several children of which any would do, it is the SA of the one that was asked.
        """
        outcome = Outcome()
        for name, is_live in live.items():
            others = self._others_of(name) & {Coverage.NEGOTIATING, Coverage.COVERED}
            if is_live and others and self.coverage(name) is not Coverage.NEGOTIATING:
                continue
            if is_live != (self.by_child[name].coverage is Coverage.COVERED):
                outcome.add(self._advance(name, Input.SA_LIVE if is_live else Input.SA_LOST))
        return outcome

    def failed(self, name: ChildName, cause: Cause) -> Outcome:
        """Back off: IKE reports a failure, or took too long."""
        if name not in self.by_child:
            return Outcome()
        item = self.by_child[name]
        if item.coverage is not Coverage.COVERED:
            item.last_error, item.failed_at = cause, self.now
        return self._advance(name, Input.FAILED)

    def done(self, name: ChildName) -> Outcome:
        """Give the kernel `GRACE` to show the SA that IKE reports up."""
        if self.coverage(name) is not Coverage.NEGOTIATING:
            return Outcome()
        self.by_child[name].reported_up = True
        return Outcome([do.AskIke(), do.StartTimer(Timer("limit", name), GRACE)])

    def timer_fired(self, timer: Timer, misfit: Cause | None = None) -> Outcome:
        """End a negotiation at its limit, or a back-off.

        `misfit`: why the child does not protect the flow although IKE reports it up.
        """
        name, coverage = timer.name, self.coverage(timer.name)
        if timer.kind == "limit" and coverage is Coverage.NEGOTIATING:
            item = self.by_child[name]
            return self.failed(name, misfit if misfit and item.reported_up else _late(item.limit))
        if timer.kind == "retry" and coverage is Coverage.BACK_OFF:
            if Coverage.NEGOTIATING in self._others_of(name):
                # Wait for its end: a call that is held must learn when all of them have failed.
                return Outcome([do.StartTimer(timer, BACK_OFF_FIRST)])
            return self._advance(name, Input.RETRY)
        return Outcome()

    def loaded(self, before: LoadedChildren, now: LoadedChildren) -> None:
        """Forget why children failed that are loaded in another form now, or no longer."""
        for name, item in self.by_child.items():
            if item.last_error is not None and before.named(name) != now.named(name):
                item.forgive()

    def ike_gone(self) -> Outcome:
        """End every negotiation: no daemon carries it on. What it said before is outdated."""
        outcome = Outcome()
        for name, item in self.by_child.items():
            item.forgive()
            outcome.add(self._advance(name, Input.IKE_GONE))
        return outcome

    def renumber(
        self, places: Mapping[ChildName, int | None], policies: Sequence[Policy]
    ) -> Outcome:
        """Apply the places that the negotiations' policies have now; drop those without one."""
        outcome = Outcome()
        self._by_place.clear()
        names = {policy.name for policy in policies}
        for known in [known for known in self.ended if known[0] not in names]:
            del self.ended[known]
        for name, place in places.items():
            item = self.by_child[name]
            if place is not None:
                item.place, item.policy = place, policies[place].name
                self._by_place.setdefault(place, set()).add(name)
                continue
            self._forget(name)
            outcome.children.add(name)
            outcome.commands += [
                do.StopTimer(Timer("limit", name)),
                do.StopTimer(Timer("retry", name)),
            ]
        return outcome

    # --- one transition -----------------------------------------------------------------

    def _others_of(self, name: ChildName) -> set[Coverage]:
        """Return the coverages of the children that would do as well as this one."""
        return {self.coverage(other) for other in self.by_child[name].choices if other != name}

    def _forget(self, name: ChildName) -> None:
        self._remove(name)
        del self.by_child[name]

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
        if before is Coverage.NEGOTIATING:
            self.ended[item.policy, ENDS[event]] += 1
        commands = self._enter(name, item, event)
        return Outcome(commands, {name}, {item.place: self.coverages(item.place)})

    def _enter(self, name: ChildName, item: Negotiation, event: Input) -> list[do.Command]:
        """Count, and return the commands of the state that `event` led to."""
        limit, retry = Timer("limit", name), Timer("retry", name)
        match item.coverage:
            case Coverage.NEGOTIATING:
                item.attempts += 1
                item.reported_up = False
                # Failed attempts are counted (`attempts`), and only the first is logged.
                again = item.failures > 0
                text = f"child {name}: negotiating for {item.flow}"
                fields = _fields("negotiating", name, item)
                log = do.Log("info", text, is_change=True, fields=fields)
                item.limit = LIMIT_WITH_NEXT if self._has_next(name) else LIMIT
                return [
                    do.Initiate(name, item.limit, item.acquire),
                    do.StartTimer(limit, item.limit + GRACE),
                    *([] if again else [log]),
                ]
            case Coverage.BACK_OFF:
                item.failures += 1
                pause = self._pause(item.failures)
                cause = item.last_error or Cause("unknown")
                text = f"child {name}: {cause.text}; retry in {pause:.1f} s"
                known, item.logged_error = item.logged_error, cause
                fields = (*_fields("failed", name, item), ("cause", cause.text))
                log = do.Log(
                    "warning", str(Problem(text, cause.advice)), is_change=True, fields=fields
                )
                return [
                    do.StopTimer(limit),
                    do.StartTimer(retry, pause),
                    *([] if known == cause else [log]),
                ]
            case Coverage.COVERED:
                after = f" after {item.failures} failures" if item.failures else ""
                item.failures = 0
                item.forgive()
            case Coverage.UNCOVERED:
                after = ""
                if event is Input.RETRY:
                    return []
        text = f"child {name}: {item.coverage.value} ({event.value}){after}"
        fields = _fields(EVENTS.get(event, "uncovered"), name, item)
        log = do.Log("info", text, is_change=True, fields=fields)
        return [do.StopTimer(limit), do.StopTimer(retry), log]

    def _has_next(self, name: ChildName) -> bool:
        """Tell whether another child is there to try if this one fails."""
        return bool(self._others_of(name) - {Coverage.BACK_OFF})

    def _pause(self, failures: int) -> float:
        """Return seconds: exponential, and spread so that many gates don't ask a peer at once."""
        pause = min(BACK_OFF_LAST, BACK_OFF_FIRST * 2.0 ** (failures - 1))
        return float(pause * (0.75 + self._spread() / 2))


def _late(limit: float) -> Cause:
    text = f"strongSwan did not finish within {limit:.0f} s"
    return Cause(text, "see strongSwan's log: `journalctl -u strongswan`")


def _fields(event: str, name: ChildName, item: Negotiation) -> tuple[tuple[str, str], ...]:
    """Return what a message about a child is about."""
    about = {"event": event, "child": name, "flow": item.flow, "policy": item.policy}
    return tuple((key, str(value)) for key, value in about.items())
