"""Refusals as receipts: one for each kind, from the first to the last, until an SA is there.

Rules of this module: what a program can cause is bounded. Refusals that differ only in source port
and process share a receipt. A program gets `FLOWS_OF_PROGRAM` of them in a `WINDOW`, and one more
for all its other flows; all programs together get `RECEIPTS`, and then one for each reason. Every
refusal is counted in one of them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from ipsecgate.admin.event_documents import Receipt as ReceiptDocument
from ipsecgate.controller.callers import NOBODY, Caller
from ipsecgate.core.gate import commands as do
from ipsecgate.core.model.events import FlowRefused
from ipsecgate.core.model.flow import Flow
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.tables.layout import EXPLAINED, Reason

WINDOW = 60.0  # seconds; a receipt without a refusal for so long is closed
FLOWS_OF_PROGRAM = 16
RECEIPTS = 128  # new ones in a window
OPEN = 512  # at a time
UNCOVERED = 512  # flows that wait for an SA
RECEIPTS_OF_FLOW = 8


class Scope(Enum):
    """Which refusals share a receipt."""

    FLOW = "flow"
    PROGRAM = "program"
    ALL = "all"


@dataclass(slots=True, eq=False)
class Receipt:
    """The refusals of one kind. `time` and `last` are of the wall clock, the rest is monotonic."""

    refusal: FlowRefused  # the first
    policy: Policy | None
    caller: Caller
    scope: Scope
    is_audited: bool
    time: float
    last: float
    count: int = 1
    child: str | None = None
    cause: str | None = None
    spi: str | None = None
    reqid: int | None = None
    covered_after: float | None = None
    seq: int = 0
    covered_at: float | None = None
    told_at: float = 0.0  # when its count was told last
    told: int = 1  # that count

    @property
    def kind(self) -> str:
        """Return whether calls were refused or packets blocked."""
        return "blocked" if Reason(self.refusal.reason).name.startswith("BLOCK") else "refused"

    @property
    def text(self) -> str:
        """Return why, in words."""
        return EXPLAINED[Reason(self.refusal.reason)]

    def add(self, refusal: FlowRefused, when: float) -> None:
        """Count one more event; `when` is of the wall clock."""
        self.count += 1 + refusal.untold
        self.last = when

    def document(self) -> ReceiptDocument:
        """Return it for a reader."""
        refusal, flow, policy = self.refusal, self.refusal.flow, self.policy
        return {
            "seq": self.seq,
            "time": self.time,
            "kind": "blocked" if self.kind == "blocked" else "refused",
            "text": self.text,
            "scope": self.scope.value,
            "count": self.count,
            "last": self.last,
            "flow": str(flow),
            "source": None if flow.saddr is None else str(flow.saddr),
            "daddr": str(flow.daddr),
            "proto": flow.proto,
            "dport": flow.dport,
            "sport": flow.sport,
            "mark": flow.mark,
            "device": flow.device,
            "netns": flow.netns,
            "reason": Reason(refusal.reason).name.lower(),
            "policy": policy.name if policy else None,
            "origin": origin_of(policy),
            "audited": self.is_audited,
            "pid": refusal.pid or None,
            "comm": refusal.comm or None,
            "cgroup_id": refusal.cgroup,
            "cgroup": self.caller.cgroup or None,
            "unit": self.caller.unit or None,
            "container": self.caller.container or None,
            "child": self.child,
            "cause": self.cause,
            "spi": self.spi,
            "reqid": self.reqid,
            "covered_after": self.covered_after,
        }


def origin_of(policy: Policy | None) -> str | None:
    """Return where a policy comes from: its file and line, or the connection."""
    if policy is None:
        return None
    return policy.origin or f"connection {policy.name.split('#')[0]}"


@dataclass(slots=True)
class _Window:
    """What was opened since `began`."""

    began: float
    receipts: int = 0
    of_program: Counter[Hashable] = field(default_factory=Counter)


class Receipts:
    """The receipts of the last `WINDOW` seconds, and those whose flows wait for an SA."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._clock = clock
        self._wall = wall
        self._open: dict[Hashable, Receipt] = {}
        self._window = _Window(clock())
        self._uncovered: dict[Flow, list[Receipt]] = {}  # by flow without source port, oldest first

    def refused(
        self,
        refusal: FlowRefused,
        policies: Sequence[Policy],
        *,
        audit: bool = False,
        caller: Caller = NOBODY,
    ) -> tuple[Receipt, bool]:
        """Count a refusal; return its receipt, and whether that is new."""
        now = self._clock()
        at = refusal.at or now
        when = self._wall() - max(0.0, now - at)
        program: Hashable = (
            refusal.reason, refusal.policy, refusal.comm, refusal.cgroup, audit,
        )  # fmt: skip
        for scope, key in (
            (Scope.FLOW, (program, _topic(refusal.flow))),
            (Scope.PROGRAM, program),
            (Scope.ALL, refusal.reason),
        ):
            found = self._open.get(key)
            if found is not None and (found.covered_at is None or at <= found.covered_at):
                found.add(refusal, when)
                return found, False
            if self._may_open(scope, program):
                break
            if found is not None:  # refused anew, but there have been too many new ones
                found.add(refusal, when)
                return found, False
        place = refusal.policy
        policy = policies[place] if place is not None and place < len(policies) else None
        receipt = Receipt(refusal, policy, caller, scope, audit, when, when, told_at=now)
        receipt.count += refusal.untold
        receipt.told = receipt.count
        self._open[key] = receipt
        self._window.receipts += 1
        if scope is Scope.FLOW:
            self._window.of_program[program] += 1
            self._wait(receipt)
        return receipt, True

    def _may_open(self, scope: Scope, program: Hashable) -> bool:
        if scope is Scope.ALL:
            return True
        if self._window.receipts >= RECEIPTS or len(self._open) >= OPEN:
            return False
        return scope is Scope.PROGRAM or self._window.of_program[program] < FLOWS_OF_PROGRAM

    def _wait(self, receipt: Receipt) -> None:
        if len(self._uncovered) >= UNCOVERED:
            del self._uncovered[next(iter(self._uncovered))]
        receipts = self._uncovered.setdefault(_topic(receipt.refusal.flow), [])
        receipts.append(receipt)
        del receipts[:-RECEIPTS_OF_FLOW]

    def covered(self, command: do.Covered) -> list[Receipt]:
        """Complete the receipts of a flow that an SA protects now, and return them."""
        found, now = self._uncovered.pop(_topic(command.flow), []), self._clock()
        for receipt in found:
            receipt.covered_at = now
            receipt.covered_after = max(0.0, now - (receipt.refusal.at or now))
            receipt.child = str(command.child) if command.child else receipt.child
            if command.sa is not None:
                receipt.spi, receipt.reqid = f"{command.sa.id.spi:08x}", command.sa.reqid
        return found

    def failed(self, child: str, cause: str) -> None:
        """Note why IKE has not brought a child up."""
        for receipts in self._uncovered.values():
            for receipt in receipts:
                if receipt.child == child:
                    receipt.cause = cause

    def due(self, *, everything: bool = False) -> Iterator[tuple[Receipt, int, float]]:
        """Yield each receipt whose count is to be told: how often more, and in how many seconds.

        Those that were not refused again are closed. `everything`: at the end, also those whose
        time has not come.
        """
        now = self._clock()
        if now - self._window.began >= WINDOW:
            self._window = _Window(now)
        for key, receipt in list(self._open.items()):
            if not everything and now - receipt.told_at < WINDOW:
                continue
            more, seconds = receipt.count - receipt.told, now - receipt.told_at
            if more:
                receipt.told, receipt.told_at = receipt.count, now
                yield receipt, more, seconds
            else:
                del self._open[key]


def _topic(flow: Flow) -> Flow:
    return replace(flow, sport=0)
