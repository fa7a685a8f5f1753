"""What became of everything, and when the kernel covered what."""

from __future__ import annotations

import collections
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from ipsecgate.lab.frames import Packet
from ipsecgate.lab.xfrm_watch import XfrmEvent

TOLERANCE = 0.06  # seconds: how near to an edge of a gap nothing is certain
CONNECTIONS = 2

Span = tuple[float, float]


@dataclass
class Tally:
    """What became of everything, over all rounds."""

    attempts: int = 0
    refused: int = 0
    blocked: int = 0
    leaked: list[Packet] = field(default_factory=list)
    let_go: int = 0  # towards what is never covered
    wrong: list[tuple[str, float]] = field(default_factory=list)  # refused, though covered
    stuck: list[str] = field(default_factory=list)  # what did not recover
    esp: int = 0
    in_clear: int = 0  # as it should be: towards what need not be protected
    complaints: int = 0  # ICMP errors of the kernel's own: docs/threat-model.md
    streams: int = 0  # connections that were made, of CONNECTIONS
    calls: int = 0  # of the process whose calls are held
    held: int = 0  # of these
    longest: float = 0.0  # seconds
    late: list[str] = field(default_factory=list)  # that took longer than they may
    strange: list[str] = field(default_factory=list)  # that failed as none may
    ended: list[str] = field(default_factory=list)  # the controller, by itself
    errors: collections.Counter[str] = field(default_factory=collections.Counter)

    def check(self) -> None:
        """Assert that nothing got out and nothing was lost; that the witnesses saw at all."""
        assert not self.leaked, f"{len(self.leaked)} packets in clear"
        assert not self.let_go, f"{self.let_go} calls let go that nothing covers"
        assert not self.stuck, f"not recovered from {self.stuck}"
        assert not self.wrong, f"{len(self.wrong)} calls refused that the kernel covered"
        assert not self.late, f"held calls that did not end: {self.late}"
        assert not self.strange, f"held calls that failed as none may: {self.strange}"
        assert self.held
        assert self.refused
        assert self.esp
        assert self.in_clear
        assert self.streams == CONNECTIONS, f"connections did not stand: {self.errors}"


def spread(spans: Sequence[Span], pauses: Sequence[Span] = ()) -> list[Span]:
    """Return spans with all that is uncertain about them.

    Where the machine let nobody work at an edge, that is everything until it did: `pauses`, in
    their order.
    """
    found = []
    for begin, end in spans:
        early, late = begin - TOLERANCE, end + TOLERANCE
        for since, until in pauses:
            if since <= late < until:
                late = until + TOLERANCE
        for since, until in reversed(pauses):
            if since < early <= until:
                early = since - TOLERANCE
        found.append((early, late))
    return found


def kernel_gaps(
    events: Sequence[XfrmEvent], family: int, ours: Container[tuple[object, object]]
) -> list[Span]:
    """Return when the kernel had no policy that names an SA for a family, or not that SA.

    A policy that names none is a trap: of the SA that is there yet IKE has taken leave.
    `ours` are the policies' ends: others, such as the floor's, say nothing.
    """
    sas: set[int] = set()
    policies: dict[tuple[object, object], int] = {}
    found: list[Span] = []
    began: float | None = -math.inf
    for event in events:
        if event.name == "FLUSHSA":
            sas.clear()
        elif event.name == "FLUSHPOLICY":
            policies.clear()
        elif not event.outbound or event.daddr is None or event.daddr.version != family:
            continue
        elif event.name in ("NEWSA", "UPDSA"):
            sas.add(event.spi)
        elif event.name in ("NEWPOLICY", "UPDPOLICY"):
            if (event.saddr, event.daddr) in ours:
                policies[event.saddr, event.daddr] = event.spi
        elif event.name == "DELPOLICY":
            policies.pop((event.saddr, event.daddr), None)
        elif event.name == "DELSA" or event.hard:
            sas.discard(event.spi)
        covered = not sas.isdisjoint(policies.values())
        if covered and began is not None:
            found.append((began, event.time))
            began = None
        elif not covered and began is None:
            began = event.time
    return [*found, *([] if began is None else [(began, math.inf)])]
