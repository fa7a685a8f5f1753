"""The hooks' two tables as they were published, and the commands that change them.

Rules of this module: what only changes an entry is one write (`SetEntry`), all
else a new table (`Publish`); rules that do not fit are replaced by stricter ones,
and `errors` says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ipsecgate.core import commands as do
from ipsecgate.core.flow import Flow
from ipsecgate.core.layout import Key, State, TableId, flow_key
from ipsecgate.core.policy import Policy, policy_rules, protect_everything, protect_networks
from ipsecgate.core.table import EMPTY, Rule, Table, TableFullError, compile_table


class Published:
    """What the hooks were told last."""

    def __init__(self) -> None:
        self.tables: dict[TableId, Table] = {}
        self.errors: dict[TableId, str] = {}
        self._policies: tuple[Policy, ...] = ()
        self._compiled = EMPTY  # the policies, before their errnos

    def spd(self, rules: Iterable[Rule]) -> list[do.Command]:
        """Bring the SPD table up to date; one that does not fit protects nothing."""
        return self._publish(TableId.SPD, self._compile(TableId.SPD, rules))

    def policies(
        self, policies: tuple[Policy, ...], errnos: Mapping[int, int], default: int
    ) -> list[do.Command]:
        """Bring the policy table up to date: policies, and by place what a refusal returns."""
        told: list[do.Command] = []
        if policies != self._policies:
            self._compiled = self._compile(
                TableId.POLICY,
                policy_rules(policies, {}),
                protect_networks(policies),
                protect_everything(policies),
            )
            self._policies = policies
            if TableId.POLICY in self.errors:
                told = [do.Log("error", self.errors[TableId.POLICY])]
        entries = {
            at: replace(entry, error=errnos.get(entry.id, default))
            for at, entry in self._compiled.entries.items()
        }
        return [*self._publish(TableId.POLICY, replace(self._compiled, entries=entries)), *told]

    def live(self) -> set[tuple[int, Key]]:
        """Return where in the SPD table a live SA protects."""
        entries = self.tables.get(TableId.SPD, EMPTY).entries
        return {at for at, entry in entries.items() if entry.state is State.LIVE}

    def is_live(self, flow: Flow) -> bool:
        """Tell whether a live SA protects a flow whose source is known."""
        entry = self.tables.get(TableId.SPD, EMPTY).classify(flow_key(flow))
        return entry is not None and entry.state is State.LIVE

    def _compile(self, which: TableId, rules: Iterable[Rule], *stricter: Iterable[Rule]) -> Table:
        """Return the rules as a table, or the first stricter ones that fit."""
        self.errors.pop(which, None)
        for choice in (rules, *stricter):
            try:
                return compile_table(choice)
            except TableFullError as error:
                text = f"{which.name} table: {error}; more is refused than need be"
                self.errors.setdefault(which, text)
        return EMPTY

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
