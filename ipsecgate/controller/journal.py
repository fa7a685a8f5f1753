"""What happened lately, for `ipsecgate events`: refusals, and all that the log was told.

Rules of this module: it remembers the last `SIZE`, no more; a number that only grows tells
a reader what it has seen already, and that it missed some.
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
    """The last records, oldest first; as a handler of `logging` it takes in what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._records: deque[Record] = deque(maxlen=SIZE)
        self._seq = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Remember what was logged."""
        self._add("log", record.getMessage(), level=record.levelname.lower())

    def refusal(self, told: FlowRefused, policies: Sequence[Policy], *, audit: bool) -> None:
        """Remember that a flow was refused, or a packet of it blocked."""
        reason = Reason(told.reason)
        place = told.policy
        self._add(
            "blocked" if reason.name.startswith("BLOCK") else "refused",
            EXPLAINED[reason],
            flow=str(told.flow),
            source=None if told.flow.saddr is None else str(told.flow.saddr),
            reason=reason.name.lower(),
            policy=policies[place].name if place is not None and place < len(policies) else None,
            audited=audit,
            pid=told.pid or None,
            comm=told.comm or None,
            cgroup_id=told.cgroup,
        )

    def since(self, seq: int) -> list[Record]:
        """Return what came after the record of that number; 0: all that is remembered."""
        return [record for record in self._records if record["seq"] > seq]

    def _add(self, kind: str, text: str, **more: Any) -> None:
        self._seq += 1
        self._records.append(
            {"seq": self._seq, "time": time.time(), "kind": kind, "text": text, **more}
        )
