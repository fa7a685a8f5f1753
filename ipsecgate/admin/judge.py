"""What the hooks' tables say of a flow now, read from the pinned maps.

Rules of this module: it changes nothing. It does what `decide` of bpf/decision.bpf.c does, but for
the IKE daemon's own sockets; flows of other network namespaces have no answer. Whoever shows a
verdict of the tables asks here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from errno import EPERM

from ipsecgate.core.model.flow import Address, Flow, FlowPath, is_exempt
from ipsecgate.core.model.value import value
from ipsecgate.core.tables.layout import Entry, Reason, Setting, State, TableId, flow_key
from ipsecgate.core.tables.table import Table
from ipsecgate.core.tables.verdict import verdict
from ipsecgate.edges.bpf.maps import Maps


@value
class Judgement:
    """Why a call for a flow would be let go, or refused.

    `policy`: the entry of the policy that names it, None: none does. `source`: its source address
    as routing has it, None: unknown, or it does not matter. `error`: the errno, 0 if it is let go.
    """

    reason: Reason
    policy: Entry | None
    source: Address | None
    error: int

    @property
    def is_allowed(self) -> bool:
        """Tell whether it would be let go."""
        return self.reason < Reason.REFUSE_UNCOVERED

    def name_in(self, names: Sequence[str]) -> str | None:
        """Return the policy's name, None if there is none. `names`: of the table's policies."""
        at = self.policy.id if self.policy is not None else len(names)
        return names[at] if at < len(names) else None


class Judge:
    """The tables as they were when it was made, and the paths as they are."""

    def __init__(self, maps: Maps, policies: Table | None, spd: Table | None) -> None:
        self._maps = maps
        self._policies = policies
        self._spd = spd
        self._deny = bool(maps.setting(Setting.DENY))
        self._error = maps.setting(Setting.ERROR)
        self._paths = maps.setting(Setting.PATHS)

    @classmethod
    def of(cls, maps: Maps) -> Judge:
        """Read the tables. Raises: OSError."""
        return cls(maps, maps.table(TableId.POLICY), maps.table(TableId.SPD))

    def judge(self, flow: Flow) -> Judgement:
        """Return what would become of a call for this flow."""
        entry = None if self._policies is None else self._policies.classify(flow_key(flow))
        reason, source = self._by_policy(flow, entry), flow.saddr
        if reason is None:
            derived = entry is not None and entry.state is State.DERIVED
            reason, source = self._follow(flow, derived=derived)
        error = (entry.error if entry is not None else self._error) or EPERM
        return Judgement(reason, entry, source, error if reason >= Reason.REFUSE_UNCOVERED else 0)

    def is_covered(self, flow: Flow) -> bool:
        """Tell whether a live SA protects a flow, whatever the policies say."""
        return self._follow(flow, derived=False)[0] is Reason.ALLOW_COVERED

    def _by_policy(self, flow: Flow, entry: Entry | None) -> Reason | None:
        """Return the reason if the policy decides alone, None if the flow must be protected."""
        if entry is not None and entry.state is State.BYPASS:
            return Reason.ALLOW_BYPASS
        if entry is None and self._policies is not None and not self._deny:
            return Reason.ALLOW_DEFAULT
        if is_exempt(flow):
            return Reason.ALLOW_EXEMPT
        if self._policies is None:
            return Reason.REFUSE_NOT_READY
        if entry is None:
            return Reason.REFUSE_DEFAULT
        return Reason.REFUSE_DISCARD if entry.state is State.DISCARD else None

    def _follow(self, flow: Flow, *, derived: bool) -> tuple[Reason, Address | None]:
        """Return the reason of a flow that must be protected, and its source."""
        path: FlowPath | None = None
        if flow.saddr is None or self._paths or flow.netns:
            path = self._maps.path(flow)
            if path is None:
                reason = Reason.REFUSE_NETNS if flow.netns else Reason.REFUSE_NO_SOURCE
                return reason, flow.saddr
            if path.outside:
                return Reason.REFUSE_OUTSIDE, flow.saddr or path.source
            if flow.saddr is None:
                flow = replace(flow, saddr=path.source)
            strict = self._paths > 1 or path.translated is not None or flow.netns
            if flow.saddr is None or (strict and flow.saddr != path.source):
                return Reason.REFUSE_NO_SOURCE, flow.saddr
        if flow.saddr == flow.daddr:
            return Reason.ALLOW_EXEMPT, flow.saddr
        tunneled = path is not None and path.is_tunneled
        found = verdict(_lookups(flow, path), self._state, derived=derived, tunneled=tunneled)
        return found, flow.saddr

    def _state(self, flow: Flow) -> State | None:
        entry = self._spd.classify(flow_key(flow)) if self._spd is not None else None
        return None if entry is None else entry.state


def _lookups(flow: Flow, path: FlowPath | None) -> Sequence[Flow]:
    """Return the flows that the kernel looks up in its SPD."""
    if path is None or not path.is_bent:
        return (flow,)
    again = replace(flow, if_id=path.if_id)
    if path.translated is not None:
        again = replace(again, saddr=path.translated, sport=0)
    if path.mark is not None:
        again = replace(again, mark=path.mark)
    return flow, again
