"""The policies in force, and the table of them that the hooks search.

    policies     the configured ones; unless one of them protects, then one for each remote
                 traffic selector ever loaded
    the table    each policy, with the errno that a call refused by it returns now

A policy's place in the list is its number in the table and in the hooks' events.

A policy that does not fit the hooks' maps becomes wider, so more is refused than necessary
(`core.tables.rule_table`); `errors` names it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import replace

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.coverage import Coverage
from ipsecgate.core.gate.derived import DerivedPolicies
from ipsecgate.core.model.flow import ANY_V4, ANY_V6, Flow, Network
from ipsecgate.core.model.ipsec import Action, ChildConfig, ChildName
from ipsecgate.core.model.policy import Policy, Settings, in_force, protects
from ipsecgate.core.model.problem import Problem
from ipsecgate.core.tables.layout import State, TableId, flow_key
from ipsecgate.core.tables.policy_rules import matches, rule_of
from ipsecgate.core.tables.rule_table import RuleTable, join_names
from ipsecgate.core.tables.table import Rule, Table, Ternary

NOT_KNOWN_YET = (Policy("not-known-yet", (ANY_V4, ANY_V6)),)


class PolicyTable:
    """The settings in force, the policies that follow from them, and the published table."""

    def __init__(self, settings: Settings, remembered: Iterable[ChildConfig]) -> None:
        self.settings = settings
        self.content: Table | None = None  # None: nothing published, so the hooks refuse all
        self._derived = DerivedPolicies(remembered)
        self._joined: tuple[tuple[Policy, ...], ...] = ((), (), ())  # two lists, and both as one
        self._networks_of: tuple[Policy, ...] | None = None
        self._networks: tuple[Network, ...] = ()  # of these policies
        self._published: tuple[Policy, ...] = ()
        self._errnos = settings.errnos  # in the table
        self._rules = RuleTable(self._widen)  # by the policy's place
        self._matches: dict[int, list[Ternary]] = {}  # by place
        self._services: Mapping[int, list[Ternary]] = {}  # the flows of services, by place
        self._errno_of: dict[int, int] = {}  # by place, as published

    @property
    def policies(self) -> tuple[Policy, ...]:
        """Return the policies in force."""
        return self._policies_of(self.settings)

    @property
    def has_own(self) -> bool:
        """Tell whether a configured policy protects something, so that none is derived."""
        return protects(self.settings.policies)

    @property
    def are_known(self) -> bool:
        """Tell whether it is known what must be protected."""
        return self.policies[-1:] != NOT_KNOWN_YET

    def _policies_of(self, settings: Settings) -> tuple[Policy, ...]:
        # A published table can only be replaced, so without policies everything is protected.
        unknown = () if self.content is None and not settings.policies else NOT_KNOWN_YET
        configured, derived = settings.policies, self._derived.policies or unknown
        known, policies = self._joined[:2], self._joined[2]
        if known[0] is not configured or known[1] is not derived:
            policies = in_force(configured, derived)
            self._joined = configured, derived, policies
        return policies

    def networks(self, settings: Settings | None = None) -> tuple[Network, ...]:
        """Return the networks that must be protected, now or with other settings."""
        policies = self._policies_of(settings or self.settings)
        if policies is not self._networks_of:
            protect = (policy for policy in policies if policy.action is Action.PROTECT)
            networks = (network for policy in protect for network in policy.remote)
            self._networks_of, self._networks = policies, tuple(dict.fromkeys(networks))
        return self._networks

    def derived(self, children: Iterable[ChildConfig]) -> tuple[Policy, ...]:
        """Return what would be derived if no configured policy protected anything."""
        return self._derived.with_children(children)

    @property
    def errors(self) -> list[Problem]:
        """Return the problems that the operator should fix."""
        widened = join_names(self._rules.closed, lambda place: self._published[place].name)
        full = Problem(
            f"POLICY table: full, so more is refused than necessary, because of {widened}",
            "use fewer prefix lengths and port ranges, or configure policies",
        )
        return [*([full] if widened else []), *self._derived.errors]

    def learn(self, settings: Settings, children: Iterable[ChildConfig]) -> list[do.Command]:
        """Derive policies from what the daemon has loaded, unless a configured one protects."""
        return [] if protects(settings.policies) else self._derived.learn(children)

    # --- one flow ---------------------------------------------------------------------

    def policy_for(self, flow: Flow) -> tuple[int, Policy] | None:
        """Return the policy that names a flow, and its place; None if none does."""
        entry = self.content.classify(flow_key(flow)) if self.content is not None else None
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
        old, self._published = self._published, policies
        for place, policy in enumerate(policies):
            self._errno_of[place] = self.settings.errnos.uncovered
            if place >= len(old) or old[place] != policy:
                self._matches[place] = matches(policy)
            self._assign(place)
        for place in range(len(policies), len(old)):
            self._rules.assign(place, ())
            del self._matches[place], self._errno_of[place]
        commands = self._publish_changes()
        told = self.errors if self._rules.closed else ()
        return [*commands, *(do.Log("error", str(one)) for one in told)]

    def publish_services(self, services: Mapping[int, list[Ternary]]) -> list[do.Command]:
        """Have these policies name flows of services, too, by their place."""
        before, self._services = self._services, services
        if before == services:
            return []
        for place in before.keys() | services.keys():
            if place < len(self._published):
                self._assign(place)
        return self._publish_changes()

    def publish_errnos(self, states: Mapping[int, Set[Coverage]]) -> list[do.Command]:
        """Set the errno of every policy, by the coverage of the children that it asked for."""
        self._errnos = self.settings.errnos
        for place in range(len(self._published)):
            self._set_errno(place, states.get(place, set()))
        return self._publish_changes()

    def set_errno(self, place: int, coverages: Set[Coverage]) -> list[do.Command]:
        """Set the errno of one policy; costs nothing for the others."""
        self._set_errno(place, coverages)
        return self._publish_changes()

    def _set_errno(self, place: int, coverages: Set[Coverage]) -> None:
        error = self._errno(coverages)
        if place in self._errno_of and self._errno_of[place] != error:
            self._errno_of[place] = error
            self._assign(place)

    def _assign(self, place: int) -> None:
        policy, error = self._published[place], self._errno_of[place]
        found = (*self._matches[place], *self._services.get(place, ()))
        self._rules.assign(place, (rule_of(policy, place, match, error) for match in found))

    def _publish_changes(self) -> list[do.Command]:
        changes = self._rules.changes()
        if self.content is None:
            self.content = self._rules.table
            return [do.Publish(TableId.POLICY, self.content)]
        entries = {match: now for match, (_, now) in changes.items()}
        return [do.Change(TableId.POLICY, entries)] if entries else []

    def _errno(self, coverages: Set[Coverage]) -> int:
        errnos = self.settings.errnos
        if Coverage.NEGOTIATING in coverages:
            return errnos.negotiating
        return errnos.failed if coverages == {Coverage.BACK_OFF} else errnos.uncovered

    def _widen(self, rules: tuple[Rule, ...]) -> list[Rule]:
        """Return what a policy that does not fit becomes; a bypass is left out.

        What it matches besides might be discarded by a later policy: then it discards that, too.
        """
        discards = any(policy.action is Action.DISCARD for policy in self.policies)
        return [
            Rule(rule.match, replace(rule.entry, state=State.DISCARD) if discards else rule.entry)
            for rule in rules
            if rule.entry.state is not State.BYPASS
        ]
