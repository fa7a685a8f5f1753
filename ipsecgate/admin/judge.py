"""What the hooks' tables say of a flow now, read from the pinned maps.

Rules of this module: it changes nothing. It does what `decide` of bpf/decision.bpf.c does, but for
the IKE daemon's own sockets; flows of other network namespaces have no answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ipsecgate.core.model.flow import Flow, FlowPath, is_exempt
from ipsecgate.core.tables.layout import Entry, Reason, Setting, State, TableId, flow_key
from ipsecgate.core.tables.table import Table
from ipsecgate.core.tables.verdict import verdict
from ipsecgate.edges.bpf.maps import Maps


class Judge:
    """The tables as they were when it was made, and the paths as they are."""

    def __init__(self, maps: Maps, policies: Table | None, spd: Table | None) -> None:
        self._maps = maps
        self._policies = policies
        self._spd = spd
        self._deny = bool(maps.setting(Setting.DENY))
        self._paths = maps.setting(Setting.PATHS)

    @classmethod
    def of(cls, maps: Maps) -> Judge:
        """Read the tables. Raises: OSError."""
        return cls(maps, maps.table(TableId.POLICY), maps.table(TableId.SPD))

    def place(self, flow: Flow) -> int | None:
        """Return the place of the policy that names a flow, None if none does."""
        entry = self._policy(flow)
        return entry.id if entry is not None else None

    def policy(self, flow: Flow) -> Entry | None:
        """Return the entry of the policy that names a flow, None if none does."""
        return self._policy(flow)

    def judge(self, flow: Flow) -> Reason:
        """Return why a call for this flow would be let go, or refused."""
        entry = self._policy(flow)
        if entry is not None and entry.state is State.BYPASS:
            return Reason.ALLOW_BYPASS
        if entry is None and self._policies is not None and not self._deny:
            return Reason.ALLOW_DEFAULT
        if is_exempt(flow) or flow.saddr == flow.daddr:
            return Reason.ALLOW_EXEMPT
        if self._policies is None:
            return Reason.REFUSE_NOT_READY
        if entry is None:
            return Reason.REFUSE_DEFAULT
        if entry.state is State.DISCARD:
            return Reason.REFUSE_DISCARD
        return self._follow(flow, derived=entry.state is State.DERIVED)

    def is_covered(self, flow: Flow) -> bool:
        """Tell whether a live SA protects a flow, whatever the policies say."""
        return self._follow(flow, derived=False) is Reason.ALLOW_COVERED

    def _policy(self, flow: Flow) -> Entry | None:
        return None if self._policies is None else self._policies.classify(flow_key(flow))

    def _follow(self, flow: Flow, *, derived: bool) -> Reason:
        path: FlowPath | None = None
        if flow.saddr is None or self._paths or flow.netns:
            path = self._maps.path(flow)
            if path is None:
                return Reason.REFUSE_NETNS if flow.netns else Reason.REFUSE_NO_SOURCE
            if path.outside:
                return Reason.REFUSE_OUTSIDE
            if flow.saddr is None:
                flow = replace(flow, saddr=path.source)
            strict = self._paths > 1 or path.translated is not None or flow.netns
            if flow.saddr is None or (strict and flow.saddr != path.source):
                return Reason.REFUSE_NO_SOURCE
        if flow.saddr == flow.daddr:
            return Reason.ALLOW_EXEMPT
        tunneled = path is not None and path.is_tunneled
        return verdict(_lookups(flow, path), self._state, derived=derived, tunneled=tunneled)

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
