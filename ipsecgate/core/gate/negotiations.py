"""What the gate asked of IKE: one negotiation a child, however many flows wait.

Source: US 7,028,332 claim 1 (the negotiation component is told to negotiate,
with the parameters of the policy that covers the flow).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.coverage import Coverage, Input, advance
from ipsecgate.core.model.events import Timer
from ipsecgate.core.model.flow import Address, Flow, Network, TrafficSelector
from ipsecgate.core.model.ipsec import ChildConfig, ChildName
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.model.prefixes import LongestPrefix
from ipsecgate.core.tables.flow_index import FlowIndex

LIMIT = 30.0  # seconds that IKE has to come to an end
GRACE = 1.0  # seconds more for IKE to say so, or for the kernel to show what IKE said
BACK_OFF_FIRST = 1.0
BACK_OFF_LAST = 60.0


def child_for(
    flow: Flow, source: Address | None, policy: Policy, children: Iterable[ChildConfig]
) -> ChildConfig | None:
    """Return the child that the policy names, else the one whose selectors fit the flow best.

    That is the narrowest remote one, because the kernel's policy for it wins. An unbound
    flow's source may change when the SA brings its own route, so a child whose local
    selector misses it is second best, not excluded.
    """
    there = flow.daddr, flow.proto, flow.dport
    if policy.child is not None:
        fitting = [c for c in children if c.name.matches(policy.child)]
    else:
        fits = {
            c: max(_narrowness(r) for r in c.remote if r.contains(*there))
            for c in children
            if any(r.contains(*there) for r in c.remote)
        }
        fitting = sorted(fits, key=lambda c: fits[c], reverse=True)
    at_home = [
        c
        for c in fitting
        if source is not None and any(s.contains(source, flow.proto, flow.sport) for s in c.local)
    ]
    if at_home or flow.saddr is not None:
        fitting = at_home
    return fitting[0] if fitting else None


class Loaded:
    """The children that the daemon has loaded, found by name and by where a flow goes."""

    def __init__(self, children: tuple[ChildConfig, ...]) -> None:
        self.children = children
        self._order = {config: at for at, config in enumerate(children)}
        self._by_name: dict[str, list[ChildConfig]] = {}
        found: dict[Network, list[ChildConfig]] = {}
        for config in self._order:
            for name in dict.fromkeys((config.name.child, str(config.name))):
                self._by_name.setdefault(name, []).append(config)
            for network in dict.fromkeys(there.network for there in config.remote):
                found.setdefault(network, []).append(config)
        self._by_network = LongestPrefix(found.items())

    def candidates(self, flow: Flow, policy: Policy) -> list[ChildConfig]:
        """Return the children that `child_for` has to look at, in the order loaded."""
        if policy.child is not None:
            return self._by_name.get(policy.child, [])
        near = {c for _, found in self._by_network.containing(flow.daddr) for c in found}
        return sorted(near, key=self._order.__getitem__)


def _narrowness(selector: TrafficSelector) -> tuple[int, bool, int]:
    low, high = selector.ports
    return selector.network.prefixlen, selector.proto != 0, low - high


@dataclass
class Negotiation:
    """One child's state, and the flow by which its coverage is judged."""

    flow: Flow
    place: int  # of the policy that asked
    policy: str  # its name
    coverage: Coverage = Coverage.UNCOVERED
    attempts: int = 0
    failures: int = 0  # in a row
    said_up: bool = False  # IKE's word, which the kernel has yet to bear out
    last_error: str = ""


@dataclass
class Negotiations:
    """Every child that was ever asked for. `random` only spreads the back-off."""

    random: Random = field(default_factory=Random)
    of: dict[ChildName, Negotiation] = field(default_factory=dict)
    flow_index: FlowIndex = field(default_factory=lambda: FlowIndex(lambda _flow: None))
    _by_flow: dict[Flow, set[ChildName]] = field(default_factory=dict)
    _by_place: dict[int, set[ChildName]] = field(default_factory=dict)
    _moved: set[ChildName] = field(default_factory=set)  # since somebody asked
    _moved_places: set[int] = field(default_factory=set)

    def ask(self, name: ChildName, flow: Flow, place: int, policy: str) -> list[do.Command]:
        """A flow that this child would protect was refused."""
        item = self.of.get(name)
        if item is None:
            item = self.of[name] = Negotiation(flow, place, policy)
            self._put(name)
        elif item.coverage is Coverage.UNCOVERED:
            self._take(name)
            item.flow, item.place, item.policy = flow, place, policy
            self._put(name)
        return self._move(name, Input.ASKED)

    def is_settled(self, name: ChildName) -> bool:
        """Tell whether to ask for a child would change nothing: it is under way, or failed."""
        item = self.of.get(name)
        return item is not None and item.coverage in (Coverage.NEGOTIATING, Coverage.BACK_OFF)

    def names(self, flows: Iterable[Flow]) -> list[ChildName]:
        """Return the children whose coverage is judged by one of these flows."""
        return sorted(name for flow in flows for name in self._by_flow.get(flow, ()))

    def moved(self) -> set[ChildName]:
        """Return whose coverage is another, since this was asked last."""
        moved, self._moved = self._moved, set()
        return moved

    def moved_places(self) -> set[int]:
        """Return the places of the policies of which one asked for such a child; the same."""
        moved, self._moved_places = self._moved_places, set()
        return moved

    def _put(self, name: ChildName) -> None:
        item = self.of[name]
        self._by_flow.setdefault(item.flow, set()).add(name)
        self._by_place.setdefault(item.place, set()).add(name)
        self._moved_places.add(item.place)
        self.flow_index.add(item.flow)

    def _take(self, name: ChildName) -> None:
        item = self.of[name]
        self.flow_index.discard(item.flow)
        self._moved_places.add(item.place)
        for index, key in ((self._by_flow, item.flow), (self._by_place, item.place)):
            index[key].discard(name)  # type: ignore[index]
            if not index[key]:  # type: ignore[index]
                del index[key]  # type: ignore[arg-type]

    def sa_is(self, name: ChildName, *, live: bool) -> list[do.Command]:
        """The kernel does, or does not, protect the child's flow now."""
        covered = self.of[name].coverage is Coverage.COVERED
        if live == covered:
            return []
        return self._move(name, Input.SA_LIVE if live else Input.SA_LOST)

    def failed(self, name: ChildName, cause: str) -> list[do.Command]:
        """IKE says that it came to nothing."""
        if name not in self.of:
            return []
        self.of[name].last_error = cause
        return self._move(name, Input.FAILED)

    def done(self, name: ChildName) -> list[do.Command]:
        """IKE says that it is up: then the kernel must show it soon."""
        if name not in self.of or self.of[name].coverage is not Coverage.NEGOTIATING:
            return []
        self.of[name].said_up = True
        return [do.AskIke(), do.StartTimer(Timer("limit", name), GRACE)]

    def timer(self, timer: Timer) -> list[do.Command]:
        """A timer of `_move`'s ran out."""
        name = timer.name
        coverage = self.of[name].coverage if name in self.of else None
        if timer.kind == "limit" and coverage is Coverage.NEGOTIATING:
            item = self.of[name]
            if item.said_up:
                return self.failed(
                    name, f"strongSwan reports it as up, but no SA protects {item.flow}"
                )
            return self.failed(name, f"strongSwan did not finish within {LIMIT:.0f} s")
        if timer.kind == "retry" and coverage is Coverage.BACK_OFF:
            return self._move(name, Input.RETRY)
        return []

    def ike_gone(self) -> list[do.Command]:
        """Nothing is being negotiated any more."""
        return [command for name in self.of for command in self._move(name, Input.IKE_GONE)]

    def renumber(
        self, place_of: Callable[[ChildName, Flow], int | None], names: Sequence[str]
    ) -> list[do.Command]:
        """The policies are others now: find each negotiation's, forget those that have none."""
        forgotten: list[do.Command] = []
        for name, item in list(self.of.items()):
            place = place_of(name, item.flow)
            self._take(name)
            if place is None:
                del self.of[name]
                self._moved.add(name)
                forgotten += [
                    do.StopTimer(Timer("limit", name)),
                    do.StopTimer(Timer("retry", name)),
                ]
            else:
                item.place, item.policy = place, names[place]
                self._put(name)
        return forgotten

    def places(self) -> set[int]:
        """Return the places of the policies that ever asked."""
        return set(self._by_place)

    def states(self, place: int) -> set[Coverage]:
        """Return the coverages of what a policy asked for."""
        return {self.of[name].coverage for name in self._by_place.get(place, ())}

    def _move(self, name: ChildName, event: Input) -> list[do.Command]:
        """Advance, and return what the new state asks for."""
        item = self.of[name]
        before, item.coverage = item.coverage, advance(item.coverage, event)
        if before is item.coverage:
            return []
        self._moved.add(name)
        self._moved_places.add(item.place)
        limit, retry = Timer("limit", name), Timer("retry", name)
        match item.coverage:
            case Coverage.NEGOTIATING:
                item.attempts += 1
                item.said_up = False
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
        """Exponential, and spread so that many gates do not ask one peer at once."""
        pause = min(BACK_OFF_LAST, BACK_OFF_FIRST * 2.0 ** (failures - 1))
        return float(pause * (0.75 + self.random.random() / 2))
