"""The operator's policies in force: as the hooks' policy table, and as the floor under it.

    policies     configured ones, else one for every known remote traffic selector
    the table    each policy, and the errno that its refusals return now
    the floor    what no process of the host may send but under an SA

A policy's place in the table is its number in the hooks' events, and is only known here.
"""

from __future__ import annotations

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.coverage import Coverage
from ipsecgate.core.gate.derived import DerivedPolicies
from ipsecgate.core.gate.hook_tables import HookTables
from ipsecgate.core.gate.negotiations import Negotiations
from ipsecgate.core.gate.protection import Protection
from ipsecgate.core.model.flow import ANY_V4, ANY_V6, Flow, Network
from ipsecgate.core.model.ipsec import Action, ChildName
from ipsecgate.core.model.policy import Policy, Settings
from ipsecgate.core.state.floor import floor_policies, is_floor
from ipsecgate.core.tables.layout import TableId, flow_key
from ipsecgate.core.tables.table import EMPTY

NOT_KNOWN_YET = (Policy("not-known-yet", (ANY_V4, ANY_V6)),)


class PolicyTable:
    """What the policies are, and what the hooks and the kernel were told of them."""

    def __init__(
        self,
        settings: Settings,
        derived: DerivedPolicies,
        hook_tables: HookTables,
        protection: Protection,
        negotiations: Negotiations,
    ) -> None:
        self.settings = settings
        self.derived = derived
        self._hook_tables = hook_tables
        self._protection = protection
        self._negotiations = negotiations
        self._numbered: tuple[Policy, ...] = ()  # by these the negotiations' places count
        self._errnos = settings.errnos
        self._floor: tuple[Policy, ...] | None = None  # the policies it is under, None: to be told

    @property
    def policies(self) -> tuple[Policy, ...]:
        """Configured policies, else one for every known remote traffic selector."""
        return self._policies_of(self.settings)

    def _policies_of(self, settings: Settings) -> tuple[Policy, ...]:
        """Return what the policies would be by these settings."""
        # What was published is only ever replaced, so without policies all of it is protected.
        unknown = NOT_KNOWN_YET if TableId.POLICY in self._hook_tables.tables else ()
        return settings.policies or self.derived.policies or unknown

    def networks(self, settings: Settings) -> tuple[Network, ...]:
        """Return the networks whose sources must be known by these settings."""
        protect = (p for p in self._policies_of(settings) if p.action is Action.PROTECT)
        return tuple(dict.fromkeys(network for policy in protect for network in policy.remote))

    @property
    def errors(self) -> list[str]:
        """What the operator should mend."""
        userland = self.settings.floor and self._protection.in_userspace
        useless = ["gate.floor has no effect, because strongSwan does ESP"] if userland else []
        tables = [*self._hook_tables.errors.values(), *self._protection.errors]
        return [*tables, *self.derived.errors, *useless]

    def refresh(self) -> list[do.Command]:
        """Bring the policy table up to date: policies, and the errno of their refusals."""
        if not self.policies:
            return []
        told: list[do.Command] = []
        if self._numbered is not self.policies or self._errnos != self.settings.errnos:
            told = self._renumber()
        for place in sorted(self._negotiations.moved_places()):
            told += self._hook_tables.errno(place, self._errno(place))
        return told + self._keep_floor()

    def _renumber(self) -> list[do.Command]:
        """Publish the policies, and find anew which of them each negotiation is for."""
        policies, uncovered = self.policies, self.settings.errnos.uncovered
        told: list[do.Command] = []
        if self._numbered != policies:
            told = self._hook_tables.policies(policies, {}, uncovered)
            self._numbered = policies
            told += self._negotiations.renumber(self._place_for, [one.name for one in policies])
        self._numbered, self._errnos = policies, self.settings.errnos
        errnos = {place: self._errno(place) for place in self._negotiations.places()}
        return told + self._hook_tables.policies(policies, errnos, uncovered)

    def place_of(self, flow: Flow) -> int | None:
        """Return the place of the policy that has a flow now."""
        entry = self._hook_tables.tables.get(TableId.POLICY, EMPTY).classify(flow_key(flow))
        return entry.id if entry and entry.id < len(self.policies) else None

    def _place_for(self, name: ChildName, flow: Flow) -> int | None:
        """Return the place of the policy for which a child may be negotiated, to protect a flow."""
        place = self.place_of(flow)
        if place is None or self.policies[place].action is not Action.PROTECT:
            return None
        child = self.policies[place].child
        return place if child is None or name.matches(child) else None

    def _errno(self, place: int) -> int:
        errnos = self.settings.errnos
        states = self._negotiations.states(place)
        if Coverage.NEGOTIATING in states:
            return errnos.negotiating
        return errnos.failed if states == {Coverage.BACK_OFF} else errnos.uncovered

    def look_at_floor(self) -> None:
        """Have it laid anew if somebody emptied the kernel's databases."""
        if self._floor is not None:
            there = sum(
                is_floor(entry) for entry in self._protection.kernel_state.policies.values()
            )
            if there < len(floor_policies(self._floor)):
                self._floor = None

    def _keep_floor(self) -> list[do.Command]:
        """Have the floor follow the policies.

        There is none in audit mode, and none where IKE does ESP itself: it would block that.
        """
        if self.policies is NOT_KNOWN_YET:
            return []
        policy_table = self.settings.floor and not self.settings.audit
        under = self.policies if policy_table and not self._protection.in_userspace else ()
        if under is self._floor or under == self._floor:
            return []
        self._floor = under
        return [do.SetFloor(floor_policies(under))]
