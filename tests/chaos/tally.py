"""Count the results, and compute from the kernel's events when what was covered."""

from __future__ import annotations

import collections
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from ipsecgate.lab.frames import Packet
from ipsecgate.lab.xfrm_events import XfrmEvent

TOLERANCE = 0.06  # seconds around the edges of a gap in which nothing is certain
CONNECTIONS = 2

Span = tuple[float, float]


@dataclass
class Tally:
    """The results of all rounds."""

    attempts: int = 0
    refused: int = 0
    blocked: int = 0
    leaked: list[Packet] = field(default_factory=list)
    let_go: int = 0  # calls that succeeded although nothing covers them
    wrong: list[tuple[str, float]] = field(default_factory=list)  # refused although covered
    not_recovered: list[str] = field(default_factory=list)  # faults
    esp: int = 0
    in_clear: int = 0  # to `open`, which needs no protection
    icmp_errors: int = 0  # sent by the kernel itself: docs/threat-model.md
    streams: int = 0  # connections that were made, of CONNECTIONS
    calls: int = 0  # of the process whose calls are held
    held: int = 0  # of those calls
    longest: float = 0.0  # seconds
    late: list[str] = field(default_factory=list)  # calls above the time limit
    unexpected: list[str] = field(default_factory=list)  # calls with an undocumented error
    exits: list[str] = field(default_factory=list)  # of the controller, by itself
    errors: collections.Counter[str] = field(default_factory=collections.Counter)

    def check(self) -> None:
        """Assert that nothing leaked and nothing was lost, and that the evidence is not empty."""
        assert not self.leaked, f"{len(self.leaked)} packets in clear"
        assert not self.let_go, f"{self.let_go} calls were allowed although nothing covers them"
        assert not self.not_recovered, f"not recovered from {self.not_recovered}"
        assert not self.wrong, f"{len(self.wrong)} calls were refused although covered"
        assert not self.late, f"held calls that did not end: {self.late}"
        assert not self.unexpected, f"held calls with an undocumented error: {self.unexpected}"
        assert self.held
        assert self.refused
        assert self.esp
        assert self.in_clear
        assert self.streams == CONNECTIONS, f"connections were lost: {self.errors}"


def widen(spans: Sequence[Span], pauses: Sequence[Span] = ()) -> list[Span]:
    """Return the spans, widened by the uncertainty at their edges.

    That is TOLERANCE, and also any pause at the edge during which the sender did not get the CPU.
    `pauses` must be in order.
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
    """Return when the kernel had, for a family, no policy whose template names an existing SA.

    A policy whose template names no SPI is a trap: an SA may still exist, but IKE has deleted it.
    `ours`: the ends of our policies; others, such as the floor's, are ignored.
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
