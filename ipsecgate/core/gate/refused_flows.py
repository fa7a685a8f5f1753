"""The flows that were refused for want of an SA, until one protects them.

Rules of this module: it serves reports (`do.Covered`), and nothing that is decided depends on it.
So it may leave flows out: a program that asks for thousands must not cost more than one that asks
for a few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice

from ipsecgate.core.model.events import FlowRefused
from ipsecgate.core.model.flow import Flow
from ipsecgate.core.tables.flow_index import FlowIndex

FLOWS = 1024  # that wait; beyond them the oldest is forgotten
PER_POLICY = 64  # of one policy; beyond them new ones are left out
FLOWS_PER_STEP = 16


class RefusedFlows:
    """Flows by their first refusal. Attempts that differ only in their source port are one flow."""

    def __init__(self, flow_index: FlowIndex) -> None:
        self._flow_index = flow_index
        self._waiting: dict[Flow, tuple[FlowRefused, str]] = {}  # with the policy; oldest first
        self._topics: dict[Flow, Flow] = {}  # the flow that waits, without its source port
        self._of_policy: Counter[str] = Counter()
        self._due: dict[Flow, None] = {}  # to look at again; a dict to None is an ordered set

    def __len__(self) -> int:
        return len(self._waiting)

    def takes(self, flow: Flow, policy: str) -> bool:
        """Tell whether a flow is to be added: it does not wait yet, and few others do."""
        return _topic(flow) not in self._topics and self._of_policy[policy] < PER_POLICY

    def add(self, refusal: FlowRefused, policy: str, lookups: Sequence[Flow]) -> None:
        """Wait for a flow that the policy of this name protects. `lookups`: see `FlowIndex`."""
        if len(self._waiting) >= FLOWS:
            self._remove(next(iter(self._waiting)))
        flow = refusal.flow
        self._waiting[flow] = refusal, policy
        self._topics[_topic(flow)] = flow
        self._of_policy[policy] += 1
        self._flow_index.add(flow, lookups)
        self._due[flow] = None  # an SA may have come before the refusal was read

    def recheck(self, flows: Iterable[Flow] | None) -> None:
        """Mark those of these flows due that wait; None: all of them."""
        waiting = self._waiting if flows is None else (f for f in flows if f in self._waiting)
        self._due.update(dict.fromkeys(waiting))

    @property
    def has_due(self) -> bool:
        """Tell whether flows are still to be looked at."""
        return bool(self._due)

    def take_due(self) -> list[FlowRefused]:
        """Return the first refusals of the next slice of due flows."""
        flows = list(islice(self._due, FLOWS_PER_STEP))
        for flow in flows:
            del self._due[flow]
        return [self._waiting[flow][0] for flow in flows]

    def discard(self, flow: Flow) -> None:
        """Stop to wait for a flow of `take_due`."""
        self._remove(flow)

    def _remove(self, flow: Flow) -> None:
        _, policy = self._waiting.pop(flow)
        del self._topics[_topic(flow)]
        self._of_policy[policy] -= 1
        if not self._of_policy[policy]:
            del self._of_policy[policy]
        self._due.pop(flow, None)
        self._flow_index.discard(flow)


def _topic(flow: Flow) -> Flow:
    return replace(flow, sport=0)
