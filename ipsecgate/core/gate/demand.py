"""From a flow to the SA that it needs: policy -> child configuration -> negotiation.

Source: US 7,028,332 claim 1: the policy that covers a refused flow says with which parameters the
negotiation component is to negotiate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_network

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.coverage import Coverage
from ipsecgate.core.gate.holds import Evaluation, FlowState
from ipsecgate.core.gate.ike import Ike
from ipsecgate.core.gate.misfit import NONE, no_child, useless, wrong_source
from ipsecgate.core.gate.negotiation import Need, Outcome
from ipsecgate.core.gate.negotiations import LIMIT, PARTS, Negotiations
from ipsecgate.core.gate.policy_table import PolicyTable
from ipsecgate.core.gate.protection import Protection
from ipsecgate.core.gate.routing import Routed, translation
from ipsecgate.core.model.events import Timer
from ipsecgate.core.model.flow import Flow, is_exempt
from ipsecgate.core.model.ipsec import Acquire, Action, ChildConfig, ChildName
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.model.problem import Cause, Problem
from ipsecgate.core.tables.layout import Reason, flow_key

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
        path = self._protection.routing.path(flow)
        if path is not None and path.outside:
            outcome.add(self._warn(f"{path.outside}. So this was refused:", flow))
        return outcome

    def wanted(self, flow: Flow, child: str = "") -> Outcome:
        """Ask for the child that would protect a flow, or for the one that is named."""
        found = self._policy_table.policy_for(flow)
        if not child or found is None:
            return self.refused(flow)
        routed, policy = self._protection.routing.route(flow), replace(found[1], child=child)
        name, outcome = self._negotiate(flow, routed, found[0], policy)
        if name is not None and self._negotiations.coverage(name) is Coverage.COVERED:
            # By another child, so that no negotiation of this one's begins.
            outcome.commands.append(do.Initiate(name, LIMIT))
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

    def covered(self, flow: Flow, at: float) -> do.Covered | None:
        """Return by what a flow is protected that was refused at this time; None if it is not."""
        found = self._policy_table.policy_for(flow)
        if found is None or found[1].action is not Action.PROTECT:
            return None
        routed = self._protection.routing.route(flow)
        if self._protection.verdict(routed, derived=found[1].derived) is not Reason.ALLOW_COVERED:
            return None
        up = (
            name
            for name in self.choices(flow, routed, found[1])
            if self._negotiations.coverage(name) is Coverage.COVERED
        )
        sa = self._protection.sa_of(routed.last)
        return do.Covered(flow, found[1].name, at, next(up, None), sa)

    def retry(self) -> Outcome:
        """Ask for the policies to start at once, and for the flows that had no child.

        Comes right after the daemon listed its connections, so it is not asked for them again.
        """
        outcome = Outcome()
        for place, policy in enumerate(self._policy_table.policies):
            if policy.start:
                # Nobody knows the peers of a wildcard before a flow names one.
                outcome.add(self._ask(policy.sample_flow(), place, policy, wildcard=False))
        orphans, self._orphans = self._orphans, set()
        for flow in orphans:
            outcome.add(self.refused(flow))
        outcome.commands = [c for c in outcome.commands if not isinstance(c, do.AskIke)]
        orphans, self._orphans = self._orphans, set()
        for flow in orphans:
            why = self._why_none(flow)
            outcome.add(self._warn("no loaded connection would protect", flow, why))
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

    def _ask(self, flow: Flow, place: int, policy: Policy, *, wildcard: bool = True) -> Outcome:
        routed = self._protection.routing.route(flow)
        needed = self._needs_sa(routed, policy)
        if not wildcard and any(c.wildcard for c in self.choices(flow, routed, policy).values()):
            return Outcome()
        return self._negotiate(flow, routed, place, policy)[1] if needed else Outcome()

    def _negotiate(
        self, flow: Flow, routed: Routed, place: int, policy: Policy
    ) -> tuple[ChildName | None, Outcome]:
        """Return the child that would protect a flow, and ask for it if that can help."""
        backends = self._protection.services.backends(flow, routed.flow.saddr)
        if backends:
            return self._negotiate_for(backends)
        choices = self.choices(flow, routed, policy)
        name, outcome = self._negotiations.preferred(choices), Outcome()
        if self._ike.problem:
            return name, outcome
        if name is None:
            if len(self._orphans) < ORPHANS:
                self._orphans.add(flow)
            return None, Outcome([do.AskIke()])  # it may have been loaded a moment ago
        need = Need(flow, routed, place, policy.name, tuple(choices))
        for _ in choices:
            if self._negotiations.coverage(name) in _STATES:
                return name, outcome
            acquire, obstacle = self._means(choices[name], routed.last)
            if obstacle is None:
                if self._protection.is_up(name):
                    why = translation(routed.path) or wrong_source(choices[name], routed.last)
                    told = f"{name} is up but does not protect"
                    outcome.add(self._warn(told, flow, Problem(why)))
                elif self._negotiations.is_full(name):
                    outcome.add(self._warn(f"not negotiated, as {PARTS} peers are already:", flow))
                else:
                    outcome.add(self._negotiations.ask(name, replace(need, acquire=acquire)))
                return name, outcome
            if not self._negotiations.is_full(name):
                outcome.add(self._negotiations.hopeless(name, need, obstacle))
            name = self._negotiations.preferred(choices) or name
        return name, outcome

    def choices(self, flow: Flow, routed: Routed, policy: Policy) -> dict[ChildName, ChildConfig]:
        """Return the children of which any would protect a flow, in the order of preference."""
        last = routed.last
        configs = self._ike.loaded.children_for(flow, last.saddr, policy)
        return {self._name_for(config, last): config for config in configs}

    def _name_for(self, config: ChildConfig, routed: Flow) -> ChildName:
        """Return what is to be negotiated of a child for a flow: all of it, or a part."""
        if config.wildcard:
            return config.name._replace(part=ip_network(routed.daddr))
        left_out = self._protection.left_out(config, routed)
        return config.name._replace(part=left_out[0]) if left_out else config.name

    def _means(self, config: ChildConfig, routed: Flow) -> tuple[Acquire | None, Cause | None]:
        """Return what IKE needs besides a child's name, and why it cannot help, None if it can."""
        left_out = self._protection.left_out(config, routed)
        if left_out:
            return None, left_out[1]
        if not config.wildcard:
            return None, None
        if routed.saddr is None:
            advice = f"see `ip route get {routed.daddr}`"
            return None, Cause(f"no route to the peer {routed.daddr}", advice)
        trap = self._protection.kernel_state.trap_for(flow_key(routed))
        if trap is None:
            return None, Cause(
                "no trap is installed, and without it nothing names the peer to strongSwan",
                f"set `start_action = trap` for {config.name}",
            )
        return Acquire(routed, trap), None

    # --- the end of a negotiation -----------------------------------------------------------

    def done(self, name: ChildName) -> Outcome:
        """IKE reports a child as up: wait for its SA, unless the peer left the flow out."""
        outcome = self._left_out(name)
        return self._negotiations.done(name) if outcome is None else outcome

    def failed(self, name: ChildName, cause: Cause) -> Outcome:
        """IKE reports a failure: try the next child that would do, if there is one."""
        if self._ike.problem is not None:
            return Outcome()  # that the daemon has gone was the end of it
        outcome = self._negotiations.failed(name, cause)
        outcome.add(self._fail_over(name))
        return outcome

    def timer_fired(self, timer: Timer) -> Outcome:
        """End a negotiation at its limit, or a back-off."""
        if self._negotiations.unconfirmed(timer) and (found := self._left_out(timer.name)):
            return found
        outcome = self._negotiations.timer_fired(timer, self._misfit(timer.name))
        outcome.add(self._fail_over(timer.name))
        return outcome

    def _fail_over(self, name: ChildName) -> Outcome:
        item = self._negotiations.by_child.get(name)
        if item is None or item.coverage is not Coverage.BACK_OFF or len(item.choices) < 2:
            return Outcome()
        return self.refused(item.flow)

    def _left_out(self, name: ChildName) -> Outcome | None:
        """Let the flow of a narrowed child fail; None if the child is not narrowed."""
        item = self._negotiations.by_child.get(name)
        config = self._ike.loaded.named(name)
        if item is None or config is None or item.coverage is not Coverage.NEGOTIATING:
            return None
        if not self._protection.left_out(config, self._protection.routing.route(item.flow).last):
            return None
        outcome = self._negotiations.narrowed(name)
        outcome.add(self.refused(item.flow))
        return outcome

    def _negotiate_for(self, backends: Sequence[Flow]) -> tuple[ChildName | None, Outcome]:
        """Ask for the children of a service's backends; return the first that is missing."""
        missing: list[ChildName | None] = []
        outcome = Outcome()
        for backend in backends:
            found = self._policy_table.policy_for(backend)
            routed = self._protection.routing.route(backend)
            if found is not None and self._needs_sa(routed, found[1]):
                name, asked = self._negotiate(backend, routed, *found)
                missing.append(name)
                outcome.add(asked)
        return next(iter(missing), None), outcome

    def _misfit(self, name: ChildName) -> Cause | None:
        """Return why a child that is up does not protect the flow that asked for it.

        It was asked all the same: the SA may have brought a route, and with it another source.
        """
        item = self._negotiations.by_child.get(name)
        if item is None or not item.reported_up:
            return None
        routed = self._protection.routing.route(item.flow).last
        return useless(self._ike.loaded.named(name), item.flow, routed)

    def _why_none(self, flow: Flow) -> Problem:
        """Return why no child would protect a flow. Text "": there is no more to say."""
        if text := translation(self._protection.routing.path(flow)):
            return Problem(text)
        found = self._policy_table.policy_for(flow)
        if found is None:
            return Problem("")
        why = no_child(self._ike.loaded, found[1], self._protection.routing.route(flow).last)
        return replace(why, text="") if why.text == NONE else why

    def _warn(self, text: str, flow: Flow, why: Problem | None = None) -> Outcome:
        """Log a warning about a flow, once. Others of its kind are counted (`do.Log`)."""
        if (text, flow) in self._warned or len(self._warned) >= WARNINGS:
            return Outcome()
        self._warned.add((text, flow))
        more = f": {why.text}" if why is not None and why.text else ""
        told = Problem(f"{text} {flow}{more}", why.advice if why is not None else "")
        fields = (("event", "unprotectable"), ("flow", str(flow)))
        return Outcome([do.Log("warning", str(told), about=text, fields=fields)])
