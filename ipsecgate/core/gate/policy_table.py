"""The policies in force, and the table of them that the hooks search.

    policies     the configured ones, else one for each remote traffic selector ever loaded
    the table    each policy, with the errno that a call refused by it returns now

A policy's place in the list is its number in the table and in the hooks' events.

Policies that do not all fit: some become wider, so more is refused than need be
(`core.tables.capacity`); `errors` names them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import replace

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.coverage import Coverage
from ipsecgate.core.gate.derived import DerivedPolicies
from ipsecgate.core.model.flow import ANY_V4, ANY_V6, Flow, Network
from ipsecgate.core.model.ipsec import Action, ChildConfig, ChildName
from ipsecgate.core.model.policy import Policy, Settings
from ipsecgate.core.tables.capacity import fit_policies, join_names
from ipsecgate.core.tables.layout import Key, TableId, flow_key
from ipsecgate.core.tables.policy_rules import policy_rules
from ipsecgate.core.tables.table import EMPTY, Table, TableFullError, compile_table

NOT_KNOWN_YET = (Policy("not-known-yet", (ANY_V4, ANY_V6)),)


class PolicyTable:
    """The settings in force, the policies that follow from them, and the published table."""

    def __init__(self, settings: Settings, remembered: Iterable[ChildConfig]) -> None:
        self.settings = settings
        self.content: Table | None = None  # None: nothing published, so the hooks refuse all
        self._derived = DerivedPolicies(remembered)
        self._published: tuple[Policy, ...] = ()
        self._errnos = settings.errnos  # in the table
        self._entries: dict[int, list[tuple[int, Key]]] = {}  # of each policy, by its place
        self._errors: list[str] = []

    @property
    def policies(self) -> tuple[Policy, ...]:
        """Return the policies in force."""
        return self._policies_of(self.settings)

    def _policies_of(self, settings: Settings) -> tuple[Policy, ...]:
        # A published table can only be replaced, so without policies everything is protected.
        unknown = () if self.content is None else NOT_KNOWN_YET
        return settings.policies or self._derived.policies or unknown

    def networks(self, settings: Settings | None = None) -> tuple[Network, ...]:
        """Return the networks that must be protected, now or with other settings."""
        policies = self._policies_of(settings or self.settings)
        protect = (policy for policy in policies if policy.action is Action.PROTECT)
        return tuple(dict.fromkeys(network for policy in protect for network in policy.remote))

    @property
    def errors(self) -> list[str]:
        """Return the problems that the operator should fix."""
        return [*self._errors, *self._derived.errors]

    def learn(self, settings: Settings, children: Iterable[ChildConfig]) -> list[do.Command]:
        """Derive policies from what the daemon has loaded, unless the settings have their own."""
        return [] if settings.policies else self._derived.learn(children)

    # --- one flow ---------------------------------------------------------------------

    def policy_for(self, flow: Flow) -> tuple[int, Policy] | None:
        """Return the policy that names a flow, and its place; None if none does."""
        entry = (self.content or EMPTY).classify(flow_key(flow))
        policies = self.policies
        return (entry.id, policies[entry.id]) if entry and entry.id < len(policies) else None

    def place_for(self, flow: Flow, name: ChildName) -> int | None:
        """Return the place of the policy that has this child protect a flow, None if none does."""
        place, policy = self.policy_for(flow) or (None, None)
        if policy is None or policy.action is not Action.PROTECT:
            return None
        return place if policy.child is None or name.matches(policy.child) else None

    # --- the table --------------------------------------------------------------------

    @property
    def is_current(self) -> bool:
        """Tell whether the table shows the policies and errnos in force."""
        return self._published is self.policies and self._errnos == self.settings.errnos

    def publish(self) -> list[do.Command]:
        """Publish the policies in force, all of them uncovered; nothing if they are published."""
        policies = self.policies
        if policies == self._published:
            self._published = policies
            return []
        compiled = self._compile(policies)
        self._published = policies
        self._entries = {}
        for at, entry in compiled.entries.items():
            self._entries.setdefault(entry.id, []).append(at)
        commands = self._replace(compiled, {})
        return [*commands, *(do.Log("error", text) for text in self._errors)]

    def publish_errnos(self, states: Mapping[int, Set[Coverage]]) -> list[do.Command]:
        """Set the errno of every policy, by the coverage of the children that it asked for."""
        self._errnos = self.settings.errnos
        errnos = {place: self._errno(coverages) for place, coverages in states.items()}
        return self._replace(self.content or EMPTY, errnos)

    def set_errno(self, place: int, coverages: Set[Coverage]) -> list[do.Command]:
        """Set the errno of one policy; costs nothing for the others."""
        table, error = self.content or EMPTY, self._errno(coverages)
        entries = {
            at: replace(table.entries[at], error=error) for at in self._entries.get(place, ())
        }
        if all(table.entries[at] == entry for at, entry in entries.items()):
            return []
        self.content = replace(table, entries={**table.entries, **entries})
        return [do.SetEntry(TableId.POLICY, *at, entry) for at, entry in entries.items()]

    def _errno(self, coverages: Set[Coverage]) -> int:
        errnos = self.settings.errnos
        if Coverage.NEGOTIATING in coverages:
            return errnos.negotiating
        return errnos.failed if coverages == {Coverage.BACK_OFF} else errnos.uncovered

    def _replace(self, table: Table, errnos: Mapping[int, int]) -> list[do.Command]:
        default = self.settings.errnos.uncovered
        entries = {
            at: replace(entry, error=errnos.get(entry.id, default))
            for at, entry in table.entries.items()
        }
        old, self.content = self.content, replace(table, entries=entries)
        changes = self.content.changes_from(old)
        if changes is None:
            return [do.Publish(TableId.POLICY, self.content)]
        return [do.SetEntry(TableId.POLICY, *change) for change in changes]

    def _compile(self, policies: tuple[Policy, ...]) -> Table:
        self._errors = []
        try:
            return compile_table(policy_rules(policies, {}))
        except TableFullError as error:
            table, widened = fit_policies(policies)
            names = join_names(policy.name for policy in widened)
            self._errors = [
                f"POLICY table: {error}; more is refused than necessary, because of {names}"
            ]
            return table
