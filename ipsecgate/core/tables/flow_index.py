"""Watched flows, found by the regions of the hooks' SPD table that changed.

Rules of this module: a change costs nothing for the flows outside its regions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from ipsecgate.core.model.flow import Flow
from ipsecgate.core.tables.layout import Key, flow_key
from ipsecgate.core.tables.table import Ternary

INDEXES = 64  # indexes kept, one per mask; when the limit is reached, all are rebuilt on demand


class FlowIndex:
    """A multiset of flows, by the hooks' keys for them in the SPD table.

    A flow's `lookups` are the flows that the kernel looks up for it; none if its source is unknown.
    """

    def __init__(self) -> None:
        self._keys: dict[Flow, tuple[Key, ...]] = {}  # none: no source, so no region has it
        self._times: Counter[Flow] = Counter()
        self._indexes: dict[Key, dict[Key, set[Flow]]] = {}  # by mask, then by masked key

    def add(self, flow: Flow, lookups: Sequence[Flow]) -> None:
        """Watch a flow; one that was added twice must be discarded twice."""
        self._times[flow] += 1
        if flow not in self._keys:
            self._keys[flow] = keys = tuple(map(flow_key, lookups))
            for mask, index in self._indexes.items():
                for key in keys:
                    index.setdefault(key.masked(mask), set()).add(flow)

    def discard(self, flow: Flow) -> None:
        """Undo one `add`."""
        self._times[flow] -= 1
        if self._times[flow] > 0:
            return
        del self._times[flow]
        keys = self._keys.pop(flow)
        for mask, index in self._indexes.items():
            for found in {key.masked(mask) for key in keys}:
                index[found].discard(flow)
                if not index[found]:
                    del index[found]

    def reroute(self, lookups: Callable[[Flow], Sequence[Flow]]) -> None:
        """Recompute every key, because routing has changed."""
        self._keys = {flow: tuple(map(flow_key, lookups(flow))) for flow in self._keys}
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
            for flow, keys in self._keys.items():
                for key in keys:
                    index.setdefault(key.masked(mask), set()).add(flow)
            self._indexes[mask] = index
        return self._indexes[mask]
