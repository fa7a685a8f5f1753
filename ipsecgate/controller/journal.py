"""Recent refusals and log messages, for `ipsecgate events`.

Rules of this module: it keeps the last `SIZE` records. Their numbers only grow, so a reader knows
which ones it has seen, and notices when it has missed some. What repeats while nothing changes is
recorded once, then counted (`repeats`).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ipsecgate.controller.repeats import Repeats, again
from ipsecgate.core.model.events import FlowRefused
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.tables.layout import EXPLAINED, Reason

SIZE = 2048

Record = dict[str, Any]


class Journal(logging.Handler):
    """The last records, oldest first; a `logging` handler, so log messages are among them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(logging.INFO)
        self._records: deque[Record] = deque(maxlen=SIZE)
        self._refusals: Repeats[Record] = Repeats(clock)
        self._seq = 0
        self.last_refusal = 0  # the number of the record about it, 0: none

    def emit(self, record: logging.LogRecord) -> None:
        """Record a log message."""
        self._add("log", record.getMessage(), level=record.levelname.lower())

    def refusal(self, event: FlowRefused, policies: Sequence[Policy], *, audit: bool) -> None:
        """Record that a flow was refused, or one of its packets blocked.

        Attempts of one program differ in their source port, and often in the process.
        """
        flow, place = event.flow, event.policy
        ends = flow.saddr, flow.daddr, flow.proto, flow.dport, flow.mark
        kind = (*ends, event.reason, place, event.comm, event.cgroup, audit)
        if (first := self._refusals.seen(kind)) is not None:
            self.last_refusal = first["seq"]
            return
        reason = Reason(event.reason)
        record = self._add(
            "blocked" if reason.name.startswith("BLOCK") else "refused",
            EXPLAINED[reason],
            flow=str(flow),
            source=None if flow.saddr is None else str(flow.saddr),
            daddr=str(flow.daddr),
            proto=flow.proto,
            dport=flow.dport,
            sport=flow.sport,
            mark=flow.mark,
            device=flow.device,
            netns=flow.netns,
            reason=reason.name.lower(),
            policy=policies[place].name if place is not None and place < len(policies) else None,
            audited=audit,
            pid=event.pid or None,
            comm=event.comm or None,
            cgroup_id=event.cgroup,
        )
        self.last_refusal = record["seq"]
        self._refusals.add(kind, record)

    def tell_repeats(self) -> None:
        """Record how often what repeats came again."""
        for first, count, seconds in self._refusals.due():
            more = {key: first[key] for key in first.keys() - {"seq", "time", "kind", "text"}}
            record = self._add(first["kind"], f"{first['text']}; {again(count, seconds)}", **more)
            if self.last_refusal == first["seq"]:
                self.last_refusal = record["seq"]

    def end(self, log: logging.Logger) -> None:
        """Log the counts that were not recorded yet, because the records end with the process."""
        for first, count, seconds in self._refusals.due(everything=True):
            log.info("%s: %s; %s", first["flow"], first["text"], again(count, seconds))

    def since(self, seq: int) -> list[Record]:
        """Return the records after the one with this number; 0: all of them."""
        return [record for record in self._records if record["seq"] > seq]

    def _add(self, kind: str, text: str, **more: Any) -> Record:
        self._seq += 1
        record = {"seq": self._seq, "time": time.time(), "kind": kind, "text": text, **more}
        self._records.append(record)
        return record


class Once(logging.Filter):
    """Lets each log message through once, and counts it while it repeats.

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
        self._messages.add(kind, (record.levelno, text))
        return True

    def tell_repeats(self, *, everything: bool = False) -> None:
        """Log how often what repeats came again; `everything`: at the end."""
        for (level, text), count, seconds in self._messages.due(everything=everything):
            told = {"is_change": True}
            self._log.log(level, "%s; %s", text, again(count, seconds), extra=told)
