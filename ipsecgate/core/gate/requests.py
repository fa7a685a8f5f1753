"""What applications ask for: flows that the hooks refused, calls that are held, waits for an SA.

Rules of this module: they are handled last in a step, and what they leave behind a slice at a time.
A process that makes many must not delay a change that closes a flow.
"""

from __future__ import annotations

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.demand import Demand
from ipsecgate.core.gate.holds import FlowState, Holds
from ipsecgate.core.gate.name_lookups import NameLookups
from ipsecgate.core.gate.policy_table import PolicyTable
from ipsecgate.core.gate.propagation import Propagation
from ipsecgate.core.gate.refused_flows import RefusedFlows
from ipsecgate.core.gate.routing import Routing
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import Flow


def is_request(event: on.Event) -> bool:
    """Tell whether an application is behind an event, which it may repeat as often as it likes."""
    return isinstance(event, on.FlowRefused | on.CallMade | on.Wanted)


class Requests:
    """Passes on what is asked for, and reports back once there is an answer."""

    def __init__(
        self,
        demand: Demand,
        holds: Holds,
        propagate: Propagation,
        *,
        refused: RefusedFlows,
        lookups: NameLookups,
        policy_table: PolicyTable,
        routing: Routing,
    ) -> None:
        self._demand = demand
        self._holds = holds
        self._propagate = propagate
        self._refused = refused
        self._lookups = lookups
        self._policy_table = policy_table
        self._routing = routing

    @property
    def has_due(self) -> bool:
        """Tell whether a slice is left."""
        return self._holds.has_due or self._refused.has_due

    def flow_refused(self, event: on.FlowRefused) -> list[do.Command]:
        """Ask for the SA of a flow that a hook refused, and remember the flow until it has one."""
        if event.policy is None:
            return []
        # That number may be one of an older table, so the policy is looked up again.
        name = self._policy_name(event.flow)
        self._lookups.refused(event.flow, name, event.pid, event.comm, event.unit)
        if name and self._refused.takes(event.flow, name):
            self._refused.add(event, name, self._routing.route(event.flow).lookups)
        return self._propagate.pass_on(self._demand.refused(event.flow, event.pid))

    def call_made(self, event: on.CallMade) -> list[do.Command]:
        """Have a call wait for the SA of its flow, unless it need not or cannot have one."""
        if self._holds.is_waiting(event.flow):
            return [self._holds.join(event)]
        evaluation, outcome = self._demand.evaluate(event.flow, event.pid)
        if evaluation.state is not FlowState.FREE:
            self._lookups.refused(event.flow, self._policy_name(event.flow), event.pid)
        return [*self._propagate.pass_on(outcome), self._holds.take(event, evaluation)]

    def wanted(self, event: on.Wanted) -> list[do.Command]:
        """Ask for the SA that somebody waits for."""
        return self._propagate.pass_on(self._demand.wanted(event.flow, event.child))

    def answer_held(self) -> list[do.Command]:
        """Evaluate a slice of the due flows again, and answer the calls that need not wait."""
        commands: list[do.Command] = []
        for flow in self._holds.take_due():
            evaluation, outcome = self._demand.evaluate(flow)
            changes = self._propagate.pass_on(outcome)
            # The daemon is polled anyway, so don't ask it for each flow.
            commands += [change for change in changes if not isinstance(change, do.AskIke)]
            commands += self._holds.update(flow, evaluation)
        return commands

    def report_covered(self) -> list[do.Command]:
        """Look at a slice of the refused flows again, and report those that an SA protects now."""
        commands: list[do.Command] = []
        for refusal in self._refused.take_due():
            covered = self._demand.covered(refusal.flow, refusal.at)
            if covered is not None:
                self._refused.discard(refusal.flow)
                commands.append(covered)
        return commands

    def _policy_name(self, flow: Flow) -> str:
        found = self._policy_table.policy_for(flow)
        return found[1].name if found else ""
