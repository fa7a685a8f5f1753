"""From a flow to the SA that it needs: policy -> child configuration -> negotiation.

Source: US 7,028,332 claim 1: the policy that covers a refused flow says with which parameters the
negotiation component is to negotiate.
"""

from __future__ import annotations

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.coverage import Coverage
from ipsecgate.core.gate.holds import Evaluation, FlowState
from ipsecgate.core.gate.ike import Ike
from ipsecgate.core.gate.negotiations import Negotiations, Outcome
from ipsecgate.core.gate.policy_table import PolicyTable
from ipsecgate.core.gate.protection import Protection
from ipsecgate.core.gate.routing import Routed
from ipsecgate.core.model.flow import Flow, is_exempt
from ipsecgate.core.model.ipsec import Action, ChildName
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.tables.layout import Reason

ORPHANS = 64  # flows remembered until a connection for them is loaded
WARNINGS = 256  # remembered, to log each once

_STATES = {Coverage.NEGOTIATING: FlowState.PENDING, Coverage.BACK_OFF: FlowState.FAILED}


class Demand:
    """Starts the negotiations of the SAs that flows need."""

    def __init__(
        self,
        policy_table: PolicyTable,
        protection: Protection,
        ike: Ike,
        negotiations: Negotiations,
    ) -> None:
        self._policy_table = policy_table
        self._protection = protection
        self._ike = ike
        self._negotiations = negotiations
        self._orphans: set[Flow] = set()  # refused, and no loaded child would protect them
        self._warned: set[tuple[str, Flow]] = set()

    def refused(self, flow: Flow, pid: int = 0) -> Outcome:
        """Ask for the child that would protect a flow which the hooks refused, and for its path.

        `pid`: the process that asked for the flow, 0: unknown.
        """
        found = self._policy_table.policy_for(flow)
        if found is None:
            return Outcome()
        outcome = Outcome(self._protection.routing.want(flow, pid))
        outcome.add(self._ask(flow, *found))
        return outcome

    def evaluate(self, flow: Flow, pid: int = 0) -> tuple[Evaluation, Outcome]:
        """Return what a call for a flow has to wait for; ask for its child if that can help."""
        table, routed = self._policy_table, self._protection.routing.route(flow)
        if table.content is None and not table.settings.audit:
            # Without a table the hooks refuse everything.
            return Evaluation(FlowState.IDLE, None, routed), Outcome()
        found = table.policy_for(flow)
        if found is None or not self._must_wait(routed, found[1]):
            return Evaluation(FlowState.FREE, None, routed), Outcome()
        name, outcome = self._negotiate(flow, routed, *found)
        outcome.commands += self._protection.routing.want(flow, pid)
        state = _STATES.get(self._negotiations.coverage(name), FlowState.IDLE)
        return Evaluation(state, name, routed), outcome

    def is_cut_off(self, flow: Flow) -> bool:
        """Tell whether an established flow has lost the SA that it must have."""
        found = self._policy_table.policy_for(flow)
        routed = self._protection.routing.route(flow)
        return found is not None and self._must_wait(routed, found[1])

    def retry(self) -> Outcome:
        """Ask for the policies to start at once, and for the flows that had no child.

        Comes right after the daemon listed its connections, so it is not asked for them again.
        """
        outcome = Outcome()
        for place, policy in enumerate(self._policy_table.policies):
            if policy.start:
                outcome.add(self._ask(policy.sample_flow(), place, policy))
        orphans, self._orphans = self._orphans, set()
        for flow in orphans:
            outcome.add(self.refused(flow))
        outcome.commands = [c for c in outcome.commands if not isinstance(c, do.AskIke)]
        orphans, self._orphans = self._orphans, set()
        for flow in orphans:
            outcome.add(self._warn("no loaded connection would protect", flow))
        return outcome

    def policies_changed(self) -> None:
        """Log again what was logged once under the old policies."""
        self._warned.clear()

    def _must_wait(self, routed: Routed, policy: Policy) -> bool:
        """Tell whether the hooks refuse a flow only because it has no SA."""
        flow = routed.flow
        if self._policy_table.settings.audit or is_exempt(flow):
            return False
        # The kernel looks up no policy for packets to the host's own addresses.
        return flow.saddr != flow.daddr and self._needs_sa(routed, policy)

    def _needs_sa(self, routed: Routed, policy: Policy) -> bool:
        """Tell whether an SA would help a flow that must be protected."""
        if policy.action is not Action.PROTECT or routed.reason is Reason.REFUSE_OUTSIDE:
            return False
        found = self._protection.verdict(routed, derived=policy.derived)
        return found >= Reason.REFUSE_UNCOVERED

    def _ask(self, flow: Flow, place: int, policy: Policy) -> Outcome:
        routed = self._protection.routing.route(flow)
        needed = self._needs_sa(routed, policy)
        return self._negotiate(flow, routed, place, policy)[1] if needed else Outcome()

    def _negotiate(
        self, flow: Flow, routed: Routed, place: int, policy: Policy
    ) -> tuple[ChildName | None, Outcome]:
        """Return the child that would protect a flow, and ask for it if that can help."""
        config = self._ike.loaded.child_for(flow, routed.last.saddr, policy)
        name = config.name if config else None
        if self._ike.error:
            return name, Outcome()
        if config is None or name is None:
            if len(self._orphans) < ORPHANS:
                self._orphans.add(flow)
            return None, Outcome([do.AskIke()])  # it may have been loaded a moment ago
        if self._negotiations.coverage(name) in _STATES:
            return name, Outcome()
        if self._protection.is_up(config):
            return name, self._warn(f"{name} is up but does not protect", flow)
        return name, self._negotiations.ask(name, flow, routed, (place, policy.name))

    def _warn(self, text: str, flow: Flow) -> Outcome:
        """Log a warning about a flow, once."""
        if (text, flow) in self._warned or len(self._warned) >= WARNINGS:
            return Outcome()
        self._warned.add((text, flow))
        return Outcome([do.Log("warning", f"{text} {flow}")])
