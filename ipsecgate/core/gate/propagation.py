"""What a change means for everything that depends on it.

SAs, kernel policies, routes -> SPD table -> negotiations -> errnos, held calls
policies                     -> POLICY table -> negotiations -> errnos, held calls; host floor
"""

from __future__ import annotations

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.holds import Holds
from ipsecgate.core.gate.host_floor import HostFloor
from ipsecgate.core.gate.negotiation import Outcome
from ipsecgate.core.gate.negotiations import Negotiations
from ipsecgate.core.gate.policy_table import PolicyTable
from ipsecgate.core.gate.protection import Protection
from ipsecgate.core.gate.refused_flows import RefusedFlows
from ipsecgate.core.tables.flow_index import FlowIndex


class Propagation:
    """Keeps tables, negotiations and held calls in step. A change costs only what it affects."""

    def __init__(
        self,
        protection: Protection,
        policy_table: PolicyTable,
        negotiations: Negotiations,
        holds: Holds,
        *,
        refused: RefusedFlows,
        flow_index: FlowIndex,
    ) -> None:
        self._protection = protection
        self._policy_table = policy_table
        self._negotiations = negotiations
        self._holds = holds
        self._refused = refused
        self._flow_index = flow_index  # the flows of negotiations, held calls and refusals
        self._floor = HostFloor()
        self._rerouted = False  # since the SPD table was last published

    def pass_on(self, outcome: Outcome) -> list[do.Command]:
        """Return the outcome's commands, and those for the errnos; recheck the calls that wait."""
        self._holds.recheck_children(outcome.children)
        commands = list(outcome.commands)
        for place, coverages in sorted(outcome.coverages.items()):
            commands += self._policy_table.set_errno(place, coverages)
        return commands

    def after_routes(self) -> None:
        """Route every flow again; `after_protection` then checks all negotiations."""
        routing = self._protection.routing
        self._flow_index.reroute(lambda flow: routing.route(flow).lookups)
        self._rerouted = True
        self._holds.recheck_all()

    def spd_read(self) -> None:
        """Restore the host floor at the next update if a dump shows that part of it is missing."""
        self._floor.compare(self._protection.kernel_state.policies.values())

    def after_protection(self) -> list[do.Command]:
        """Publish the SPD table, before anything else; then pass on which children are covered.

        Until enough is known a predecessor's table stays in force.
        """
        if not self._protection.is_known:
            return []
        table = self._protection.spd_table
        commands = self._protection.publish()
        if self._policy_table.settings.destroy and table.lost:
            commands.append(do.CutOff())
        changed, self._rerouted = None if self._rerouted else table.changed, False
        if changed is None:
            self._holds.recheck_all()
            self._refused.recheck(None)
            children = list(self._negotiations.by_child)
        else:
            flows = self._flow_index.within(changed)
            self._holds.recheck_flows(flows)
            self._refused.recheck(flows)
            children = self._negotiations.judged_by(flows)
        by_child = self._negotiations.by_child
        live = {name: self._protection.is_live(by_child[name].flow) for name in children}
        return commands + self.pass_on(self._negotiations.set_live(live))

    def after_services(self) -> list[do.Command]:
        """Have the flows of services judged by the policies of their backends."""
        table = self._policy_table
        if table.content is None:
            return []
        matches = self._protection.services.judge(table.policies)
        commands = table.publish_services(matches)
        self._holds.recheck_all()
        return [*commands, *self.after_protection()]

    def after_policies(self) -> list[do.Command]:
        """Publish the policies and errnos if they have changed; update the host floor."""
        table, commands = self._policy_table, list[do.Command]()
        if not table.policies:
            return []
        if not table.is_current:
            if commands := table.publish():
                places = {
                    name: table.place_for(item.flow, name)
                    for name, item in self._negotiations.by_child.items()
                }
                renumbered = self._negotiations.renumber(places, table.policies)
                commands += self.pass_on(renumbered)
            commands += table.publish_services(self._protection.services.judge(table.policies))
            commands += table.publish_errnos(self._negotiations.coverages_by_place())
            self._holds.recheck_all()
        return commands + self.floor()

    def floor(self) -> list[do.Command]:
        """Bring the host floor up to date with the policies and the host's addresses."""
        table = self._policy_table
        if not table.policies or not table.are_known:
            return []
        return self._floor.update(
            table.policies,
            table.settings,
            own=self._protection.routing.addresses,
            userspace_esp=self._protection.in_userspace,
        )
