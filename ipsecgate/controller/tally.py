"""How much was refused by each policy and to each cgroup, for metrics and `ipsecgate top`.

Rules of this module: cgroups come and go, and a hostile one can make thousands more. So the one
without a refusal for the longest time is forgotten when there are more than `CGROUPS`.
"""

from __future__ import annotations

import time
from collections.abc import Container, Sequence

from ipsecgate.admin.status_document import Refused
from ipsecgate.core.model.events import FlowRefused
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.tables.layout import Reason

CGROUPS = 512


class Tally:
    """The counts since the controller started."""

    def __init__(self) -> None:
        self._policies: dict[str | None, Refused] = {}
        self._cgroups: dict[int, Refused] = {}  # the last refused at the end

    def refusal(self, event: FlowRefused, policies: Sequence[Policy]) -> None:
        """Count a refused request, or a blocked packet."""
        place = event.policy
        policy = policies[place].name if place is not None and place < len(policies) else None
        former = self._cgroups.pop(event.cgroup, None)
        if former is None and len(self._cgroups) >= CGROUPS:
            del self._cgroups[next(iter(self._cgroups))]
        self._cgroups[event.cgroup] = _counted(former, event, policy)
        self._policies[policy] = _counted(self._policies.get(policy), event, policy)

    def by_policy(self, policies: Container[str]) -> list[Refused]:
        """Return the counts of each policy; forget all but the policies of these names."""
        for name in [name for name in self._policies if name and name not in policies]:
            del self._policies[name]
        return [*self._policies.values()]

    def by_cgroup(self) -> list[Refused]:
        """Return the counts of each cgroup, the last refused first."""
        return [*reversed(self._cgroups.values())]


def _counted(former: Refused | None, event: FlowRefused, policy: str | None) -> Refused:
    blocked = Reason(event.reason).name.startswith("BLOCK")
    count = 1 + event.untold
    return {
        "policy": policy,
        "cgroup_id": event.cgroup,
        "comm": event.comm or (former["comm"] if former else ""),
        "flow": str(event.flow),
        "time": time.time(),
        "refused": (former["refused"] if former else 0) + (0 if blocked else count),
        "blocked": (former["blocked"] if former else 0) + (count if blocked else 0),
    }
