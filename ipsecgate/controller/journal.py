"""What happened lately: refusals and log messages, for `ipsecgate events` and the log.

    a refusal      a receipt (`receipts`): recorded and logged once, then counted
    an SA for it   the receipt says so; recorded and logged again
    a log message  recorded

Rules of this module: it keeps the last `SIZE` records. Their numbers only grow, so a reader knows
which ones it has seen, and notices when it has missed some. What repeats while nothing changes is
recorded once, then counted (`repeats`, `receipts`).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ipsecgate.admin.event_documents import LogMessage, Record, Update
from ipsecgate.controller.callers import NOBODY, Caller
from ipsecgate.controller.receipts import Receipt, Receipts, Scope
from ipsecgate.controller.repeats import Repeats, again
from ipsecgate.core.gate import commands as do
from ipsecgate.core.model.events import FlowRefused
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.model.problem import Problem
from ipsecgate.core.tables.layout import Reason

SIZE = 2048
OTHERS = {
    Scope.FLOW: "",
    Scope.PROGRAM: " and other flows of the same program",
    Scope.ALL: " and other flows of many programs",
}

log = logging.getLogger("ipsecgate")

Awaited = Callable[[FlowRefused], tuple[str | None, str]]
"""Returns the child that a refused flow waits for, and why it is not up; "": nothing is wrong."""


@dataclass(slots=True, eq=False)
class _Message:
    seq: int
    time: float
    text: str
    level: str
    fields: dict[str, str]

    def document(self) -> LogMessage:
        return {
            "seq": self.seq,
            "time": self.time,
            "kind": "log",
            "text": self.text,
            "level": self.level,
            "fields": self.fields,
        }


@dataclass(slots=True, eq=False)
class _News:
    """News of a receipt, as it was then."""

    seq: int
    told: Update

    def document(self) -> Update:
        return self.told


class Journal(logging.Handler):
    """The last records, oldest first; a `logging` handler, so log messages are among them."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        awaited: Awaited = lambda _refusal: (None, ""),
    ) -> None:
        super().__init__(logging.INFO)
        self._records: deque[_Message | _News | Receipt] = deque(maxlen=SIZE)
        self._receipts = Receipts(clock)
        self._awaited = awaited
        self._seq = 0
        self.last_refusal = 0  # the number of its receipt, 0: none

    def emit(self, record: logging.LogRecord) -> None:
        """Record a log message, unless it is about a receipt."""
        if getattr(record, "is_receipt", False):
            return
        fields: dict[str, str] = getattr(record, "fields", {})
        text, level = record.getMessage(), record.levelname.lower()
        self._records.append(_Message(self._next(), time.time(), text, level, fields))
        if fields.get("event") == "failed":
            self._receipts.failed(fields["child"], fields["cause"])

    def refusal(
        self,
        event: FlowRefused,
        policies: Sequence[Policy],
        *,
        audit: bool,
        caller: Caller = NOBODY,
    ) -> None:
        """Record that a flow was refused, or one of its packets blocked."""
        receipt, is_new = self._receipts.refused(event, policies, audit=audit, caller=caller)
        if is_new:
            if event.reason in (Reason.REFUSE_UNCOVERED, Reason.BLOCK_CLEAR):
                child, cause = self._awaited(event)
                receipt.child, receipt.cause = child, cause or None
            self._put(receipt)
            level = logging.WARNING if receipt.kind == "blocked" else logging.INFO
            log.log(level, "%s", headline(receipt), extra=_about(receipt, receipt.kind))
        self.last_refusal = receipt.seq

    def covered(self, command: do.Covered) -> None:
        """Record that an SA protects a flow that was refused."""
        for receipt in self._receipts.covered(command):
            text = in_time(receipt)
            self._tell("covered", receipt, text)
            flow = receipt.refusal.flow
            log.info("%s is covered %s", flow, text, extra=_about(receipt, "covered"))

    def tell_repeats(self) -> None:
        """Record how often what repeats came again."""
        for receipt, more, seconds in self._receipts.due():
            if receipt.seq < self._records[0].seq:
                self._put(receipt)  # others have pushed it out
            else:
                self._tell("again", receipt, again(more, seconds))

    def end(self) -> None:
        """Log the counts that were not told yet, because the records end with the process."""
        for receipt, more, seconds in self._receipts.due(everything=True):
            text = f"{receipt.refusal.flow}{OTHERS[receipt.scope]}: {receipt.text}"
            counted = again(more, seconds)
            log.info("%s; %s", text, counted, extra=_about(receipt, receipt.kind))

    def since(self, seq: int) -> list[Record]:
        """Return the records after the one with this number; 0: all of them."""
        return [record.document() for record in self._records if record.seq > seq]

    def _tell(self, kind: Literal["again", "covered"], receipt: Receipt, text: str) -> None:
        """Record news of a receipt."""
        told: Update = {
            "seq": self._next(),
            "time": time.time(),
            "kind": kind,
            "text": text,
            "of": receipt.seq,
            "count": receipt.count,
            "flow": str(receipt.refusal.flow),
            "policy": receipt.policy.name if receipt.policy else None,
            "unit": receipt.caller.unit or None,
            "container": receipt.caller.container or None,
            "child": receipt.child,
            "spi": receipt.spi,
            "reqid": receipt.reqid,
            "covered_after": receipt.covered_after,
        }
        self._records.append(_News(told["seq"], told))

    def _put(self, receipt: Receipt) -> None:
        receipt.seq = self._next()
        self._records.append(receipt)

    def _next(self) -> int:
        self._seq += 1
        return self._seq


def headline(receipt: Receipt) -> str:
    """Return a receipt in one line, as it begins."""
    refusal, caller = receipt.refusal, receipt.caller
    place = caller.container or caller.unit
    words = [f"pid {refusal.pid}"] * bool(refusal.pid) + [place] * bool(place)
    process = refusal.comm and f" of {refusal.comm}"
    where = f" ({', '.join(words)})" if words else ""
    done = f"{receipt.kind} {refusal.flow}{OTHERS[receipt.scope]}{process}{where}"
    policy = f"; policy {receipt.policy.name}" if receipt.policy else ""
    cause = f"; {receipt.cause}" if receipt.cause else ""
    audit = "; let through: audit mode" if receipt.is_audited else ""
    return f"{done}: {receipt.text}{policy}{cause}{audit}"


def in_time(receipt: Receipt) -> str:
    """Return what protects a receipt's flow now, and how long that took."""
    seconds = receipt.covered_after or 0.0
    after = f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
    by = f"by {receipt.child}, " if receipt.child else ""
    sa = f", SPI {receipt.spi}, reqid {receipt.reqid}" if receipt.spi else ""
    return f"{by}{after} after the first refusal{sa}"


def _about(receipt: Receipt, event: str) -> dict[str, object]:
    """Return what a log message about a receipt has besides its text."""
    document = receipt.document()
    names = ("policy", "origin", "flow", "reason", "unit", "container", "cgroup", "comm", "pid")
    later = ("child", "cause", "spi", "reqid", "covered_after", "count")
    fields = {"event": event}
    for name in (*names, *later):
        value = document[name]  # type: ignore[literal-required]
        if value is not None:
            fields[name] = str(value)
    return {"fields": fields, "is_change": True, "is_receipt": True}


class Once(logging.Filter):
    """Lets each log message through once, and counts it while it repeats, then without advice.

    Attributes of a record: `is_change`: it is never held back. `about`: see `do.Log`.
    """

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._log = log
        self._messages: Repeats[tuple[int, str]] = Repeats(clock)

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log a record."""
        if getattr(record, "is_change", False):
            return True
        text = record.getMessage()
        kind = record.levelno, getattr(record, "about", "") or text
        if self._messages.seen(kind) is not None:
            return False
        problem = record.args[0] if isinstance(record.args, tuple) and record.args else None
        told = problem.text if isinstance(problem, Problem) and record.msg == "%s" else text
        self._messages.add(kind, (record.levelno, told))
        return True

    def tell_repeats(self, *, everything: bool = False) -> None:
        """Log how often what repeats came again; `everything`: at the end."""
        for (level, text), count, seconds in self._messages.due(everything=everything):
            told = {"is_change": True}
            self._log.log(level, "%s; %s", text, again(count, seconds), extra=told)
