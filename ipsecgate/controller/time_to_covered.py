"""How long flows wait for an SA: from a flow's first refusal until one protects it, by policy.

A histogram for each policy, as Prometheus has them: a bucket counts what took at most so long.

Rules of this module: the times are the kernel's, of the refusal, and ours right after the hooks'
tables were written. The histograms begin with the controller. A refusal that is read after its flow
was covered is of before, and counts no second time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Container
from dataclasses import dataclass, field, replace
from itertools import accumulate

from ipsecgate.admin.status_document import TimeToCovered
from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.refused_flows import FLOWS
from ipsecgate.core.model.flow import Flow

# Seconds. On a LAN strongSwan takes some 20 ms; it repeats an unanswered request after 4 s, and a
# negotiation ends after 30 s.
BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(slots=True)
class Histogram:
    """The times of one policy, in seconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))  # the last: longer
    sum: float = 0.0


class TimesToCovered:
    """The histograms of all policies that had a flow covered."""

    def __init__(self) -> None:
        self._by_policy: dict[str, Histogram] = {}
        # When a flow was covered last, by the flow without its source port; the oldest first.
        self._covered_at: dict[Flow, float] = {}

    def add(self, covered: do.Covered, now: float) -> bool:
        """Count a flow that is covered now (CLOCK_MONOTONIC); return False if it was before."""
        flow = replace(covered.flow, sport=0)
        before = self._covered_at.get(flow)
        if before is not None and covered.at <= before:
            return False
        self._covered_at.pop(flow, None)
        self._covered_at[flow] = now
        if len(self._covered_at) > FLOWS:
            del self._covered_at[next(iter(self._covered_at))]
        seconds = now - covered.at
        histogram = self._by_policy.setdefault(covered.policy, Histogram())
        histogram.counts[bisect_left(BOUNDS, seconds)] += 1
        histogram.sum += seconds
        return True

    def document(self, policies: Container[str]) -> list[TimeToCovered]:
        """Return the histograms for the status document; forget all but these policies'."""
        for name in [name for name in self._by_policy if name not in policies]:
            del self._by_policy[name]
        return [
            {
                "policy": name,
                "buckets": [
                    [bound, count]
                    for bound, count in zip(BOUNDS, accumulate(one.counts), strict=False)
                ],
                "sum": one.sum,
                "count": sum(one.counts),
            }
            for name, one in self._by_policy.items()
        ]
