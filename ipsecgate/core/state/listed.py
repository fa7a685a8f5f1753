"""The CHILD_SAs that the IKE daemon lists: which of the kernel's states are its own, and whose."""

from __future__ import annotations

from collections.abc import Container, Iterable

from ipsecgate.core.model.ipsec import ChildName, ChildSa, SaId
from ipsecgate.core.state.groups import Groups


class ListedSas:
    """By their outbound state. `is_connected`: whether the daemon is; without it, it lists none."""

    def __init__(self) -> None:
        self.is_connected = False
        self.by_state: dict[SaId, ChildSa] = {}
        self._by_name: Groups[ChildName, SaId] = Groups()

    def replace(self, established: Iterable[ChildSa], present: Container[SaId]) -> list[SaId]:
        """Take the daemon's list; return the states about which it says something else now.

        It may be older than what `add` was told, so a CHILD_SA whose state is `present` is kept.
        """
        self.is_connected = True
        before = self.by_state
        kept = {state: sa for state, sa in before.items() if state in present}
        self.by_state = kept | {sa.outbound: sa for sa in established}
        changed = [
            state
            for state in before.keys() | self.by_state.keys()
            if before.get(state) != self.by_state.get(state)
        ]
        for state in changed:
            self._rename(state, before.get(state), self.by_state.get(state))
        return changed

    def add(self, sa: ChildSa) -> None:
        """Take one that came up."""
        self._rename(sa.outbound, self.by_state.get(sa.outbound), sa)
        self.by_state[sa.outbound] = sa

    def clear(self) -> None:
        """Forget all: the daemon has gone."""
        self.is_connected = False
        self.by_state, self._by_name = {}, Groups()

    def of(self, name: ChildName) -> list[ChildSa]:
        """Return those of a child."""
        return [self.by_state[state] for state in self._by_name.of(name)]

    def all(self) -> list[ChildSa]:
        """Return every one."""
        return list(self.by_state.values())

    def _rename(self, state: SaId, old: ChildSa | None, new: ChildSa | None) -> None:
        if old is not None:
            self._by_name.discard(old.name, state)
        if new is not None:
            self._by_name.add(new.name, state)
