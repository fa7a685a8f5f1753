"""A gated process calls repeatedly while its SA changes; each result is compared with the kernel.

    covered(t)  at time t the kernel has an outbound SA and an outbound policy, by its XFRM events
    gap         a period that is not covered
    uncertain   a period in which a call may be refused or let through

The gate's own status is not evidence. The evidence is the kernel's events, a capture between the
hosts, and the result of each system call.

The gate and this recorder get the kernel's events at the same time, but the gate needs the
processor before it can act, and the guest has only one. So a call within `Record.tolerance` of the
edge of a gap may go either way. The tolerance is TOLERANCE plus twice the longest time that the
calling process itself waited for the processor.

A preempted kernel may delete an SA while a packet is passing through it. The call then returns the
kernel's own EINVAL, and XfrmOutStateInvalid counts it. That many EINVALs are accepted.
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
from ipsecgate.lab.hosts import Lab
from ipsecgate.lab.recorder import Recorder
from ipsecgate.lab.xfrm_events import POLICY_ADDED, XfrmEvent
from tests.system.prober import PERIOD, Attempt, Prober, Target

TOLERANCE = 0.03
SETTLE = 0.15
TIMEOUT = PATIENCE = 60.0
REFUSALS = ("EPERM", "EHOSTUNREACH")
DIED = "EINVAL"

log = logging.getLogger(__name__)

Gap = tuple[float, float]
Wanted = Callable[[XfrmEvent], bool]


def outbound(event: XfrmEvent) -> bool:
    return bool(event.outbound)


def gaps(events: Sequence[XfrmEvent], wanted: Wanted = outbound) -> list[Gap]:
    """Return the periods without a wanted SA or policy; the first one begins at -inf."""
    sas: set[int] = set()
    policies: set[tuple[object, object]] = set()
    found: list[Gap] = []
    began: float | None = -math.inf
    for event in filter(outbound, events):
        match event.name:
            case "NEWSA" | "UPDSA" if wanted(event):
                sas.add(event.spi)
            case name if name in POLICY_ADDED and wanted(event):
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
    policies = [event.time for event in mine if event.name in POLICY_ADDED]
    return [
        (end, next((when for when in policies if when >= end), end))
        for _, end in found
        if end in sas
    ]


@dataclass(frozen=True, slots=True)
class Record:
    """Every attempt, the kernel's gaps, and the captured packets. Times are CLOCK_MONOTONIC."""

    attempts: list[Attempt]
    gaps: list[Gap]
    seen: Captured
    died: int  # packets whose SA was deleted while they passed through it
    uncertain: list[Gap] = field(default_factory=list)

    @property
    def inner_gaps(self) -> list[Gap]:
        """The gaps after the first SA."""
        return [gap for gap in self.gaps if gap[0] > -math.inf]

    @property
    def tolerance(self) -> float:
        """Return how close to the edge of a gap a call may go either way, in seconds."""
        pairs = zip(self.attempts, self.attempts[1:], strict=False)
        waited = max((after.ended - before.ended for before, after in pairs), default=0.0)
        return TOLERANCE + 2 * waited

    def wrongly_refused(self) -> list[Attempt]:
        """Return the attempts refused outside all gaps; the kernel counts those with EINVAL."""
        margin, fine = self.tolerance, ("", DIED)
        return [a for a in self.attempts if a.error not in fine and not self._touched(a, margin)]

    def wrongly_let_through(self) -> list[Attempt]:
        """Return the attempts let through inside a gap."""
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
        """Return the packets that host a sent in clear; host b has no gate."""
        return [packet for packet in self.seen.clear if packet.sender == "a"]

    def edge(self) -> float:
        """Return the largest distance from a gap's edge at which an attempt went the other way."""
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
        wrong = f"{len(self.wrongly_refused())} refused, {len(self.wrongly_let_through())} let go"
        return (
            f"{len(self.attempts)} attempts, {refused} refused, gaps [{lengths}] ms, "
            f"wrong: {wrong}, at an edge {self.edge() * 1000:.1f} of "
            f"{self.tolerance * 1000:.0f} ms; "
            f"ESP {len(self.seen.esp)}, in clear {len(self.in_clear())}"
        )

    def judge(self, gaps: int | None = 0) -> None:
        """Assert that every result matches the kernel; `gaps`: how many, None for any number."""
        assert self.in_clear() == [], self.figures()
        assert self.wrongly_refused() == [], self.figures()
        assert self.wrongly_let_through() == [], self.figures()
        errors = Counter(a.error for a in self.attempts)
        assert errors.pop(DIED, 0) <= self.died, self.figures()
        assert errors.keys() <= {"", *REFUSALS}, self.figures()
        assert self.seen.esp
        last = {a.target: a.error for a in self.attempts}
        assert set(last.values()) == {""}, "covered again"
        if gaps is not None:
            assert len(self.inner_gaps) == gaps


class Observation:
    """Record the kernel, the wire, and a gated process that calls `targets` under an SA.

    `load` loads the connections; everything after it is recorded. The block begins when the first
    SA is in use.
    """

    record: Record

    def __init__(
        self,
        lab: Lab,
        gate: Gated,
        recorder: Recorder,
        name: str,
        targets: Sequence[Target],
        load: Callable[[], object],
        period: float = PERIOD,
    ) -> None:
        self._lab, self._gate, self._recorder, self._name = lab, gate, recorder, name
        self._targets, self._load, self._period = targets, load, period
        self._capture = lab.capture()
        self._prober: Prober | None = None
        self.uncovered: list[Gap] = []  # gaps that the SAs alone do not show
        self.uncertain: list[Gap] = []
        self.patience = PATIENCE  # seconds at the end for every target to be let through

    def __enter__(self) -> Self:
        self._recorder.forget()
        self._died = self._count_died()
        self._capture.start()
        try:
            self._load()
            space = self._lab.a.namespace.path
            self._prober = Prober(space, self._gate.cgroup, self._targets, self._period)
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
        if self._prober is not None:
            self._prober.close()
        self._capture.close()

    def _finish(self) -> None:
        assert self._prober is not None
        self._attempts = self._prober.stop(self.patience)
        self._prober = None
        self._seen = self._capture.stop()
        self._events = list(self._recorder.events())
        self._died = self._count_died() - self._died
        self.record = self.record_of(self._targets)
        log.info("%s: %s", self._name, self.record.figures())

    def record_of(self, targets: Sequence[Target], wanted: Wanted = outbound) -> Record:
        """Return the record of these targets, which depend on the wanted SAs and policies."""
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
        """Wait for the first outbound event of these names (EXPIRE: hard); return its time."""
        when = self._recorder.wait(*names, since=since, timeout=timeout)
        assert when is not None, f"no {names} in {timeout:.0f} s"
        return when

    def wait_sa(self, since: float = 0.0) -> float:
        """Wait until the first SA after `since` is in use; return when it was installed."""
        when = self.wait("NEWSA", since=since)
        self.wait(*POLICY_ADDED, since=when)
        time.sleep(SETTLE)
        return when
