"""Clients that wait until something is covered (`ipsecgate wait`, `up`), or gone (`down`).

A waiter sleeps until a step of the gate may have changed what it waits for. Then one round looks at
the goals of all waiters, each distinct goal once, a slice at a time.

Rules of this module: a goal counts as covered only once the hooks' tables are written that say so.
However many wait, rounds take at most a tenth of the time.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ipsecgate.admin.wait import Down, Target
from ipsecgate.controller import ending
from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate import readiness
from ipsecgate.core.gate.coverage import Coverage
from ipsecgate.core.gate.gate import Gate
from ipsecgate.core.gate.readiness import Goal, Kind, Progress, State
from ipsecgate.core.gate.samples import Samples
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import PORT_MASK, TCP, UDP, Flow, parse_address
from ipsecgate.core.model.ipsec import ChildName
from ipsecgate.edges.host.control_server import Request

PAUSE = 0.05  # seconds between two rounds at least; longer after a round that took long
SLICE = 16  # goals looked at before other tasks get a turn
LONGEST = 60.0  # seconds that one request may wait
ASK_AGAIN = 31.0  # seconds until IKE is asked again if its negotiation is unchanged
ASK_AGAIN_BLIND = 2.0  # if no child is known, such as for a service with several backends

_Place = tuple[Goal, bool]
_Asked = tuple[tuple[ChildName | None, int], float]


@dataclass(eq=False)
class _Waiter:
    """One client. `every`: policies, too; `seen`: what it knows already, None: only the end counts.

    `news` is set when its request is to be answered.
    """

    goals: tuple[Goal, ...]
    every: bool
    negotiate: bool
    seen: str | None
    news: asyncio.Event

    def goals_now(self, gate: Gate) -> list[_Place]:
        """Return the goals, and whether each is only one of all policies."""
        every = readiness.every_policy(gate) if self.every else ()
        return [*((goal, False) for goal in self.goals), *((goal, True) for goal in every)]


class Waiters:
    """The clients that wait. `put` delivers an event, `execute` carries out a command for IKE."""

    def __init__(
        self,
        gate: Gate,
        put: Callable[[on.Event], None],
        execute: Callable[[do.IkeCommand], Awaitable[None]],
    ) -> None:
        self.verbs = {"wait": self.wait, "down": self.down}
        self._gate = gate
        self._put = put
        self._execute = execute
        self._samples = Samples(gate)
        self._all: set[_Waiter] = set()
        self._stirred = asyncio.Event()
        self._writing = False
        self._asked: dict[tuple[Flow, str], _Asked] = {}

    def __len__(self) -> int:
        return len(self._all)

    # --- the controller's loop --------------------------------------------------------

    def writing(self) -> None:
        """Note that commands are being carried out: the hooks may not know yet what the gate does.

        `stir` ends this.
        """
        self._writing = True

    def stir(self) -> None:
        """Note that a step was carried out, so that a goal may have been reached."""
        self._writing = False
        if self._all:
            self._stirred.set()

    async def run(self) -> None:
        """Look after each step, until cancelled."""
        while True:
            await self._stirred.wait()
            self._stirred.clear()
            began = time.monotonic()
            await self._round()
            await asyncio.sleep(max(PAUSE, 9 * (time.monotonic() - began)))

    async def _round(self) -> None:
        known: dict[_Place, Progress] = {}
        for waiter in tuple(self._all):
            found = []
            for place in waiter.goals_now(self._gate):
                if self._writing:
                    return  # `stir` follows
                if place not in known:
                    known[place] = self._look(place)
                    if len(known) % SLICE == 0:
                        await asyncio.sleep(0)
                found.append(known[place])
                if waiter.negotiate:
                    self._ask_for(known[place])
            # This may be over by now, so `_answer` looks again.
            if _is_over(found) or waiter.seen not in (None, self._mark(found)):
                waiter.news.set()

    def _look(self, place: _Place) -> Progress:
        return readiness.look(self._gate, self._samples, place[0], every=place[1])

    def _ask_for(self, progress: Progress) -> None:
        """Have IKE asked for the SAs that are missing, once for each state of its negotiation."""
        if progress.state is not State.WAITING:
            return
        now = time.monotonic()
        for flow in progress.missing:
            wanted = readiness.wanted(self._gate, flow, progress.child)
            if wanted is None:
                continue
            before = self._asked.get((flow, progress.child))
            pause = ASK_AGAIN if wanted[0] is not None else ASK_AGAIN_BLIND
            if before is None or before[0] != wanted or now - before[1] >= pause:
                self._asked[flow, progress.child] = wanted, now
                self._put(on.Wanted(flow, progress.child))

    # --- requests ---------------------------------------------------------------------

    async def wait(self, request: Request) -> dict[str, Any]:
        """Answer when everything is covered, when there is news, or after `limit` seconds.

        Raises: UsageError.
        """
        waiter, limit = request.read(_waiter)
        self._all.add(waiter)
        self._stirred.set()
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(limit):
                    while not (answer := await self._news(waiter))["covered"]:
                        if waiter.seen is not None or _is_final(answer):
                            break
                    return answer
            return await self._answer(waiter)
        finally:
            self._all.discard(waiter)
            if not self._all:
                self._asked.clear()

    async def _news(self, waiter: _Waiter) -> dict[str, Any]:
        await waiter.news.wait()
        waiter.news.clear()
        return await self._answer(waiter)

    async def _answer(self, waiter: _Waiter) -> dict[str, Any]:
        while self._writing:
            await asyncio.sleep(0.001)
        targets, found = list[Target](), list[Progress]()
        for place in waiter.goals_now(self._gate):
            found.append(self._look(place))
            targets.append(_target(self._gate, place[0], found[-1]))
            if len(found) % SLICE == 0:
                await asyncio.sleep(0)
        covered = bool(found) and all(one.state is State.COVERED for one in found)
        if waiter.every and not readiness.every_policy(self._gate):
            covered = False
            targets.append(_nothing_known())
        return {"covered": covered, "targets": targets, "seen": self._mark(found)}

    def _mark(self, found: Iterable[Progress]) -> str:
        """Return a text that changes when something does that a person would want to see."""
        marks = []
        for progress in found:
            name = None
            if progress.missing:
                flow = progress.missing[0]
                name = readiness.negotiation_of(self._gate, flow, progress.child)
            item = self._gate.negotiations.by_child.get(name) if name is not None else None
            state = (item.coverage, item.attempts, item.last_error) if item is not None else None
            marks.append((progress.state, len(progress.missing), str(name), state))
        return f"{zlib.crc32(repr((marks, self._gate.ike.problem)).encode()):08x}"

    async def down(self, request: Request) -> Down:
        """End CHILD_SAs (`controller.ending`)."""
        name, limit = request.read(lambda words: (str(words["name"]), float(words["limit"])))
        return await ending.down(self._gate, self._execute, name, limit, self._is_writing)

    def _is_writing(self) -> bool:
        return self._writing


def _waiter(words: Mapping[str, Any]) -> tuple[_Waiter, float]:
    """Read a request; return its limit in seconds, too. Raises: KeyError, TypeError, ValueError."""
    goals = (
        *(Goal(Kind.FLOW, str(name), _flow(*flow)) for name, *flow in words["flows"]),
        *(Goal(Kind.POLICY, str(name)) for name in words["policies"]),
        *(Goal(Kind.NAME, str(name)) for name in words["names"]),
    )
    seen = None if words["seen"] is None else str(words["seen"])
    every, negotiate = bool(words["every"]), bool(words["negotiate"])
    limit = min(max(0.0, float(words["limit"])), LONGEST)
    return _Waiter(goals, every, negotiate, seen, asyncio.Event()), limit


def _flow(daddr: str, proto: int, dport: int) -> Flow:
    if proto not in (TCP, UDP) or dport not in range(1, PORT_MASK + 1):
        raise ValueError(f"no flow has protocol {proto!r} and port {dport!r}")
    return Flow(parse_address(daddr), proto, dport)


def _is_over(found: list[Progress]) -> bool:
    """Tell whether all goals are reached, or one never will be."""
    states = {progress.state for progress in found}
    return states == {State.COVERED} or State.NEVER in states


def _is_final(answer: Mapping[str, Any]) -> bool:
    return any(target["state"] == State.NEVER.value for target in answer["targets"])


def _target(gate: Gate, goal: Goal, progress: Progress) -> Target:
    flow = next(iter(progress.missing or progress.flows), None)
    name = readiness.negotiation_of(gate, flow, progress.child) if flow is not None else None
    item = gate.negotiations.by_child.get(name) if name is not None else None
    coverage = None if name is None else gate.negotiations.coverage(name)
    if progress.state is State.COVERED and name is not None:
        coverage = Coverage.COVERED  # if somebody else had it negotiated, too
    problem = readiness.cause(gate, progress)
    return Target(
        target=goal.name,
        kind=goal.kind.value,
        state=progress.state.value,
        flows=len(progress.flows),
        covered_flows=len(progress.flows) - len(progress.missing),
        flow=str(progress.missing[0]) if progress.missing else None,
        network=readiness.network_of(gate, progress.missing[0]) if progress.missing else None,
        child=None if name is None else str(name),
        negotiation=None if coverage is None else coverage.value,
        attempts=0 if item is None else item.attempts,
        cause=problem.text,
        advice=problem.advice,
    )


def _nothing_known() -> Target:
    return Target(
        target="every policy", kind="policy", state="waiting", flows=0, covered_flows=0, flow=None,
        network=None, child=None, negotiation=None, attempts=0,
        cause="no policy is known yet, and no connection is loaded",
        advice="see `swanctl --list-conns`",
    )  # fmt: skip
