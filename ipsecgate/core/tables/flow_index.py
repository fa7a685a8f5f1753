"""Watched flows, found by the regions of the hooks' SPD table that changed.

Rules of this module: a change costs nothing for the flows outside its regions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from ipsecgate.core.model.flow import Flow
from ipsecgate.core.tables.layout import Key, flow_key
from ipsecgate.core.tables.table import Ternary

INDEXES = 64  # indexes kept, one per mask; when the limit is reached, all are rebuilt on demand


class FlowIndex:
    """A multiset of flows, by the hooks' keys for them in the SPD table.

    A flow is looked up as `routed`: with the source that routing chooses, None if unknown.
    """

    def __init__(self) -> None:
        self._keys: dict[Flow, Key | None] = {}  # None: no source, so no region has it
        self._times: Counter[Flow] = Counter()
        self._indexes: dict[Key, dict[Key, set[Flow]]] = {}  # by mask, then by masked key

    def add(self, flow: Flow, routed: Flow) -> None:
        """Watch a flow; one that was added twice must be discarded twice."""
        self._times[flow] += 1
        if flow not in self._keys:
            self._keys[flow] = key = _key_of(routed)
            for mask, index in self._indexes.items():
                if key is not None:
                    index.setdefault(key.masked(mask), set()).add(flow)

    def discard(self, flow: Flow) -> None:
        """Undo one `add`."""
        self._times[flow] -= 1
        if self._times[flow] > 0:
            return
        del self._times[flow]
        key = self._keys.pop(flow)
        for mask, index in self._indexes.items():
            if key is not None:
                index[key.masked(mask)].discard(flow)
                if not index[key.masked(mask)]:
                    del index[key.masked(mask)]

    def reroute(self, route: Callable[[Flow], Flow]) -> None:
        """Recompute every key, because source addresses have changed."""
        self._keys = {flow: _key_of(route(flow)) for flow in self._keys}
        self._indexes.clear()

    def within(self, regions: Iterable[Ternary]) -> set[Flow]:
        """Return the flows that lie in one of the regions."""
        found: set[Flow] = set()
        for region in regions:
            found |= self._index(region.mask).get(region.value, set())
        return found

    def _index(self, mask: Key) -> dict[Key, set[Flow]]:
        if mask not in self._indexes:
            if len(self._indexes) >= INDEXES:
                self._indexes.clear()
            index: dict[Key, set[Flow]] = {}
            for flow, key in self._keys.items():
                if key is not None:
                    index.setdefault(key.masked(mask), set()).add(flow)
            self._indexes[mask] = index
        return self._indexes[mask]


def _key_of(routed: Flow) -> Key | None:
    return None if routed.saddr is None else flow_key(routed)
