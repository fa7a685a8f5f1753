"""Recent refusals and log messages, for `ipsecgate events`.

Rules of this module: it keeps the last `SIZE` records. Their numbers only grow, so a reader knows
which ones it has seen, and notices when it has missed some.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from ipsecgate.core.model.events import FlowRefused
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.tables.layout import EXPLAINED, Reason

SIZE = 2048

Record = dict[str, Any]


class Journal(logging.Handler):
    """The last records, oldest first; a `logging` handler, so log messages are among them."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._records: deque[Record] = deque(maxlen=SIZE)
        self._seq = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Record a log message."""
        self._add("log", record.getMessage(), level=record.levelname.lower())

    def refusal(self, event: FlowRefused, policies: Sequence[Policy], *, audit: bool) -> None:
        """Record that a flow was refused, or one of its packets blocked."""
        reason = Reason(event.reason)
        place = event.policy
        self._add(
            "blocked" if reason.name.startswith("BLOCK") else "refused",
            EXPLAINED[reason],
            flow=str(event.flow),
            source=None if event.flow.saddr is None else str(event.flow.saddr),
            daddr=str(event.flow.daddr),
            proto=event.flow.proto,
            dport=event.flow.dport,
            sport=event.flow.sport,
            mark=event.flow.mark,
            reason=reason.name.lower(),
            policy=policies[place].name if place is not None and place < len(policies) else None,
            audited=audit,
            pid=event.pid or None,
            comm=event.comm or None,
            cgroup_id=event.cgroup,
        )

    def since(self, seq: int) -> list[Record]:
        """Return the records after the one with this number; 0: all of them."""
        return [record for record in self._records if record["seq"] > seq]

    def _add(self, kind: str, text: str, **more: Any) -> None:
        self._seq += 1
        self._records.append(
            {"seq": self._seq, "time": time.time(), "kind": kind, "text": text, **more}
        )
