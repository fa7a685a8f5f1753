"""The hooks' two tables as they were published, and the commands that change them.

Rules of this module: what only changes an entry is one write (`SetEntry`), all
else a new table (`Publish`); of rules that do not all fit some close (`core.tables.capacity`), and
`errors` says which.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from ipsecgate.core.gate import commands as do
from ipsecgate.core.model.flow import Flow
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.tables.capacity import fit_policies, fit_spd
from ipsecgate.core.tables.layout import Key, State, TableId, flow_key
from ipsecgate.core.tables.policy_rules import policy_rules
from ipsecgate.core.tables.table import EMPTY, Rule, Table, TableFullError, Ternary, compile_table

NAMED = 8  # of what is closed, in a line


class ProtectionSource(Protocol):
    """Who knows what is protected: `Mirror` or `UserspaceEsp`."""

    def hook_rules(self) -> list[Rule]:
        """Return the SPD table as rules."""

    def peer_of(self, owner: Any, /) -> Hashable:
        """Return who answers for the owner of a rule."""

    def name_of(self, owner: Any, /) -> str:
        """Return its name."""


class HookTables:
    """What the hooks were told last."""

    def __init__(self) -> None:
        self.tables: dict[TableId, Table] = {}
        self.errors: dict[TableId, str] = {}
        self.changed: list[Ternary] | None = []  # of the SPD table, last; None: anything
        self._policies: tuple[Policy, ...] = ()
        self._compiled = EMPTY  # the policies, before their errnos
        self._places: dict[int, list[tuple[int, Key]]] = {}  # where each policy is in the table

    def spd(self, source: ProtectionSource) -> list[do.Command]:
        """Bring the SPD table up to date; whose rules do not fit is not protected."""
        rules = source.hook_rules()
        self.errors.pop(TableId.SPD, None)
        try:
            table = compile_table(rules)
        except TableFullError as error:
            table, closed = fit_spd(rules, source.peer_of)
            names = _list(source.name_of(one) for one in closed)
            self.errors[TableId.SPD] = f"SPD table: {error}; refused until all fit: {names}"
        self.changed = _difference(self.tables.get(TableId.SPD), table)
        return self._publish(TableId.SPD, table)

    def policies(
        self, policies: tuple[Policy, ...], errnos: Mapping[int, int], default: int
    ) -> list[do.Command]:
        """Bring the policy table up to date: policies, and by place what a refusal returns."""
        told: list[do.Command] = []
        if policies != self._policies:
            self._compiled = self._compile(policies)
            self._policies = policies
            self._places = {}
            for at, entry in self._compiled.entries.items():
                self._places.setdefault(entry.id, []).append(at)
            if TableId.POLICY in self.errors:
                told = [do.Log("error", self.errors[TableId.POLICY])]
        entries = {
            at: replace(entry, error=errnos.get(entry.id, default))
            for at, entry in self._compiled.entries.items()
        }
        return [*self._publish(TableId.POLICY, replace(self._compiled, entries=entries)), *told]

    def errno(self, place: int, error: int) -> list[do.Command]:
        """Have the refusals of one policy return another errno."""
        table = self.tables[TableId.POLICY]
        now = {at: replace(table.entries[at], error=error) for at in self._places.get(place, ())}
        if all(table.entries[at] == entry for at, entry in now.items()):
            return []
        self.tables[TableId.POLICY] = replace(table, entries={**table.entries, **now})
        return [do.SetEntry(TableId.POLICY, *at, entry) for at, entry in now.items()]

    def live(self) -> set[tuple[int, Key]]:
        """Return where in the SPD table a live SA protects."""
        entries = self.tables.get(TableId.SPD, EMPTY).entries
        return {at for at, entry in entries.items() if entry.state is State.LIVE}

    def is_live(self, flow: Flow) -> bool:
        """Tell whether a live SA protects a flow whose source is known."""
        entry = self.tables.get(TableId.SPD, EMPTY).classify(flow_key(flow))
        return entry is not None and entry.state is State.LIVE

    def _compile(self, policies: Sequence[Policy]) -> Table:
        """Return the policies as a table; those that do not fit are wider in it."""
        self.errors.pop(TableId.POLICY, None)
        try:
            return compile_table(policy_rules(policies, {}))
        except TableFullError as error:
            table, widened = fit_policies(policies)
            names = _list(policy.name for policy in widened)
            self.errors[TableId.POLICY] = (
                f"POLICY table: {error}; more is refused than necessary, because of {names}"
            )
            return table

    def _publish(self, which: TableId, table: Table) -> list[do.Command]:
        old = self.tables.get(which)
        self.tables[which] = table
        if old is None or not table.same_shape(old):
            return [do.Publish(which, table)]
        return [
            do.SetEntry(which, index, key, entry)
            for (index, key), entry in table.entries.items()
            if old.entries[index, key] != entry
        ]


def _difference(old: Table | None, new: Table) -> list[Ternary] | None:
    """Return the regions outside which every flow gets the answer that it got; None: unknown.

    A flow that no entry matches which came, went or changed meets the same ones, in the same
    order, if the masks are in the same.
    """
    if old is None or any(len(set(one.masks)) < len(one.masks) for one in (old, new)):
        return None
    common = set(old.masks) & set(new.masks)
    order = [[mask for mask in one.masks if mask in common] for one in (old, new)]
    if order[0] != order[1]:
        return None
    before, now = (
        {(one.masks[index], key): entry for (index, key), entry in one.entries.items()}
        for one in (old, new)
    )
    changed = {at for at, _ in before.items() ^ now.items()}
    return [Ternary(key, mask) for mask, key in changed]


def _list(names: Iterable[str]) -> str:
    """Return names in a line, not all if there are many."""
    told = list(dict.fromkeys(names))
    return ", ".join(told[:NAMED]) + (f" and {len(told) - NAMED} more" if told[NAMED:] else "")
