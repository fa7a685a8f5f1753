"""A gated process speaks while the SA under it lives; what it met is held against the kernel.

    covered(t): the kernel has an outbound SA and an outbound policy at t, by its own XFRM events
    gap:        from the moment that ceased to be until it is again
    uncertain:  whoever is refused then is excused, and nobody has to be

Rules of this module: the gate's own word counts for nothing. The witnesses are the kernel's
events, a capture between the hosts, and what each system call returned. The kernel tells the gate
and the witness at one time, and the gate needs the processor (the guest has one, and two charons
want it) before it can act: a call that was made within `Record.tolerance` of an edge of a gap
may go either way. That is TOLERANCE and twice the longest that the speaking process, which wants
the processor as well, was kept waiting for it: the gate waits for its turn, and loses it once.

A kernel that is preempted may delete an SA while a packet is on its way through it: the call then
has the kernel's own EINVAL, and XfrmOutStateInvalid counts it. So many of those are no surprise.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from ipsecgate.lab.capture import Captured
from ipsecgate.lab.frames import Packet
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import Host, Lab
from ipsecgate.lab.xfrm_watch import XfrmEvent
from tests.system.pulse import PERIOD, Attempt, Pulse, Target
from tests.system.witness import ProtectionSource

TOLERANCE = 0.03
SETTLE = 0.15
TIMEOUT = PATIENCE = 60.0
REFUSALS = ("EPERM", "EHOSTUNREACH")
DIED = "EINVAL"
POLICIES = ("NEWPOLICY", "UPDPOLICY")

log = logging.getLogger(__name__)

Gap = tuple[float, float]
Wanted = Callable[[XfrmEvent], bool]


def outbound(event: XfrmEvent) -> bool:
    return bool(event.outbound)


def gaps(events: Sequence[XfrmEvent], wanted: Wanted = outbound) -> list[Gap]:
    """Return when the kernel had no wanted SA, or no wanted policy, to begin with none."""
    sas: set[int] = set()
    policies: set[tuple[object, object]] = set()
    found: list[Gap] = []
    began: float | None = -math.inf
    for event in filter(outbound, events):
        match event.name:
            case "NEWSA" | "UPDSA" if wanted(event):
                sas.add(event.spi)
            case name if name in POLICIES and wanted(event):
                policies.add((event.saddr, event.daddr))
            case "DELPOLICY":
                policies.discard((event.saddr, event.daddr))
            case _ if event.name == "DELSA" or event.hard:
                sas.discard(event.spi)
        if sas and policies and began is not None:
            found.append((began, event.time))
            began = None
        elif not (sas and policies) and began is None:
            began = event.time
    return [*found, *([] if began is None else [(began, math.inf)])]


def openings(
    events: Sequence[XfrmEvent], found: Sequence[Gap], wanted: Wanted = outbound
) -> list[Gap]:
    """Return from when an SA ended a gap until a policy came: the gate waits for one to name it."""
    mine = [event for event in events if event.outbound and wanted(event)]
    sas = {event.time for event in mine if event.name == "NEWSA"}
    policies = [event.time for event in mine if event.name in POLICIES]
    return [
        (end, next((when for when in policies if when >= end), end))
        for _, end in found
        if end in sas
    ]


@dataclass(frozen=True, slots=True)
class Record:
    """What happened: every attempt, the kernel's gaps, the wire. Times are CLOCK_MONOTONIC."""

    attempts: list[Attempt]
    gaps: list[Gap]
    seen: Captured
    died: int  # packets whose SA went under them
    uncertain: list[Gap] = field(default_factory=list)

    @property
    def inner_gaps(self) -> list[Gap]:
        """The gaps after the first SA."""
        return [gap for gap in self.gaps if gap[0] > -math.inf]

    @property
    def tolerance(self) -> float:
        """Return how near to a gap's edge nothing is certain, in seconds."""
        pairs = zip(self.attempts, self.attempts[1:], strict=False)
        waited = max((after.ended - before.ended for before, after in pairs), default=0.0)
        return TOLERANCE + 2 * waited

    def wrongly_refused(self) -> list[Attempt]:
        """Return who was refused outside of all gaps; what died is counted by the kernel."""
        margin, fine = self.tolerance, ("", DIED)
        return [a for a in self.attempts if a.error not in fine and not self._touched(a, margin)]

    def wrongly_let_go(self) -> list[Attempt]:
        margin = -self.tolerance
        return [a for a in self.attempts if not a.error and self._within(a, margin)]

    def _touched(self, a: Attempt, margin: float) -> bool:
        return any(
            begin - margin <= a.ended and a.began <= end + margin
            for begin, end in (*self.gaps, *self.uncertain)
        )

    def _within(self, a: Attempt, margin: float) -> bool:
        return any(
            begin - margin <= a.began and a.ended <= end + margin for begin, end in self.gaps
        )

    def in_clear(self) -> list[Packet]:
        """Return what host a sent in clear; host b has no gate."""
        return [packet for packet in self.seen.clear if packet.sender == "a"]

    def edge(self) -> float:
        """Return how far from a gap's edge an attempt went the other way."""
        distances = [
            min(
                abs(when - edge) for gap in self.gaps for edge in gap for when in (a.began, a.ended)
            )
            for a in self.attempts
            if not (self._touched(a, 0) if a.error else not self._within(a, 0))
        ]
        return max(distances, default=0.0)

    def figures(self) -> str:
        refused = sum(bool(a.error) for a in self.attempts)
        lengths = ", ".join(f"{(end - begin) * 1000:.0f}" for begin, end in self.inner_gaps)
        wrong = f"{len(self.wrongly_refused())} refused, {len(self.wrongly_let_go())} let go"
        return (
            f"{len(self.attempts)} attempts, {refused} refused, gaps [{lengths}] ms, "
            f"wrong: {wrong}, at an edge {self.edge() * 1000:.1f} of "
            f"{self.tolerance * 1000:.0f} ms; "
            f"ESP {len(self.seen.esp)}, in clear {len(self.in_clear())}"
        )

    def judge(self, gaps: int | None = 0) -> None:
        """Assert that the gate's answers were the kernel's; any number of gaps if None."""
        assert self.in_clear() == [], self.figures()
        assert self.wrongly_refused() == [], self.figures()
        assert self.wrongly_let_go() == [], self.figures()
        told = Counter(a.error for a in self.attempts)
        assert told.pop(DIED, 0) <= self.died, self.figures()
        assert told.keys() <= {"", *REFUSALS}, self.figures()
        assert self.seen.esp
        last = {a.target: a.error for a in self.attempts}
        assert set(last.values()) == {""}, "covered again"
        if gaps is not None:
            assert len(self.inner_gaps) == gaps


class Life:
    """The witnesses, and a gated process that speaks to `targets` under an SA when this begins.

    `load` has the connections loaded: nothing that comes after is unseen.
    """

    record: Record

    def __init__(
        self,
        lab: Lab,
        gate: Gated,
        witness: ProtectionSource,
        name: str,
        targets: Sequence[Target],
        load: Callable[[], object],
        period: float = PERIOD,
    ) -> None:
        self._lab, self._gate, self._witness, self._name = lab, gate, witness, name
        self._targets, self._load, self._period = targets, load, period
        self._capture = lab.capture()
        self._pulse: Pulse | None = None
        self.uncovered: list[Gap] = []  # what the SAs alone don't show
        self.uncertain: list[Gap] = []
        self.patience = PATIENCE  # at the end, until everything is let go

    def __enter__(self) -> Self:
        self._witness.forget()
        self._died = self._count_died()
        self._capture.start()
        try:
            self._load()
            space = self._lab.a.namespace.path
            self._pulse = Pulse(space, self._gate.cgroup, self._targets, self._period)
            self.wait_sa()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                time.sleep(SETTLE)
                self._finish()
        finally:
            self._close()

    def _close(self) -> None:
        if self._pulse is not None:
            self._pulse.close()
        self._capture.close()

    def _finish(self) -> None:
        assert self._pulse is not None
        self._attempts = self._pulse.stop(self.patience)
        self._pulse = None
        self._seen = self._capture.stop()
        self._events = list(self._witness.events())
        self._died = self._count_died() - self._died
        self.record = self.record_of(self._targets)
        log.info("%s: %s", self._name, self.record.figures())

    def record_of(self, targets: Sequence[Target], wanted: Wanted = outbound) -> Record:
        """Return what happened to these targets, which depend on the wanted SAs and policies."""
        found = sorted([*gaps(self._events, wanted), *self.uncovered])
        attempts = [a for a in self._attempts if a.target in targets]
        uncertain = [*self.uncertain, *openings(self._events, found, wanted)]
        return Record(attempts, found, self._seen, self._died, uncertain)

    def _count_died(self) -> int:
        return self._lab.a.counters()["XfrmOutStateInvalid"]

    def routed(self, since: float) -> list[float]:
        """Return when routes changed after `since`."""
        return [e.time for e in self._events if e.name == "ROUTE" and e.time >= since]

    def wait(self, *names: str, since: float = 0.0, timeout: float = TIMEOUT) -> float:
        """Return when the first outbound event of these names came; EXPIRE is the hard one."""
        deadline = time.monotonic() + timeout
        while True:
            for event in self._witness.events():
                loud = event.hard or event.name != "EXPIRE"
                if event.outbound and event.name in names and event.time >= since and loud:
                    return event.time
            assert time.monotonic() < deadline, f"no {names} in {timeout:.0f} s"
            time.sleep(0.005)

    def wait_sa(self, since: float = 0.0) -> float:
        """Return when the first SA after `since` came in; it is in use for a while by then."""
        when = self.wait("NEWSA", since=since)
        self.wait(*POLICIES, since=when)
        time.sleep(SETTLE)
        return when


def ask(host: Host, command: str, **what: str) -> None:
    """Have a VICI command carried out, and wait for its end."""
    with host.charon.session() as session:
        answer = getattr(session, command)(what)
        if command == "terminate":
            list(answer)


def ike_sas(host: Host) -> set[bytes]:
    with host.charon.session() as session:
        return {sa["uniqueid"] for each in session.list_sas() for sa in each.values()}


def until(condition: Callable[[], bool], otherwise: str, timeout: float = TIMEOUT) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.01)
