"""How far the protection is that somebody waits for: of a flow, of a policy, or of a child.

A policy is covered when live SAs protect all flows that stand for it (`core.gate.samples`).

Rules of this module: it changes nothing. A flow that an operator lets leave unprotected is never
covered. One that never leaves the host is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import Enum

from ipsecgate.core.gate.coverage import Coverage
from ipsecgate.core.gate.explanation import ike_step, no_path
from ipsecgate.core.gate.gate import Gate
from ipsecgate.core.gate.samples import Samples
from ipsecgate.core.model.flow import Flow, is_exempt
from ipsecgate.core.model.ipsec import Action, ChildConfig, ChildName, ChildSa
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.model.prefixes import PrefixSet, as_prefix
from ipsecgate.core.model.problem import Problem
from ipsecgate.core.model.value import value
from ipsecgate.core.tables.layout import Reason

_NAMES = 8  # that an error lists
_NO_PEER = (
    "its peers are not known before a flow names one: `ipsecgate wait --to HOST:PORT` waits for one"
)


class Kind(Enum):
    """What is waited for. NAME: a policy, or a child by "ike/child" or its own name."""

    FLOW = "flow"
    POLICY = "policy"
    NAME = "name"


@value
class Goal:
    """One thing that is waited for. `flow`: with FLOW; `name` is then what the operator wrote."""

    kind: Kind
    name: str
    flow: Flow | None = None


class State(Enum):
    """Whether a goal is reached. NEVER: only another configuration would change that."""

    COVERED = "covered"
    WAITING = "waiting"
    NEVER = "never"


@value
class Progress:
    """How far a goal is.

    `flows`: all that stand for it; `missing`: those that no live SA protects. `child`: the one that
    must protect them, "" if any may. `why`: what is wrong with the goal itself, "" if nothing is.
    """

    state: State
    flows: tuple[Flow, ...] = ()
    missing: tuple[Flow, ...] = ()
    child: str = ""
    why: str = ""


def every_policy(gate: Gate) -> tuple[Goal, ...]:
    """Return a goal for each policy that protects; none while no policy is known."""
    if gate.policy_table.content is None or not gate.policy_table.are_known:
        return ()
    return tuple(
        Goal(Kind.POLICY, policy.name)
        for policy in gate.policies
        if policy.action is Action.PROTECT
    )


def look(gate: Gate, samples: Samples, goal: Goal, *, every: bool = False) -> Progress:
    """Return how far a goal is.

    `every`: it is one of all policies. Then one whose peers nobody knows in advance counts as
    covered: there is nothing to wait for.
    """
    if goal.flow is not None:
        return _progress(gate, (goal.flow,))
    if goal.kind is Kind.NAME and not _is_configured(gate, goal.name):
        children = [c for c in gate.ike.loaded.children if c.name.matches(goal.name)]
        if children:
            return _child_progress(gate, samples, goal.name, children)
    policy = _policy(gate, goal.name)
    if gate.policy_table.content is None:
        return Progress(State.WAITING, why="no policy is known yet, and no connection is loaded")
    if policy is None:
        return Progress(
            State.NEVER if _is_final(gate, goal) else State.WAITING, why=_unknown(gate, goal)
        )
    if policy.action is not Action.PROTECT:
        return Progress(State.NEVER, why=f"policy {policy.name} does not protect anything")
    flows = samples.of(policy)
    if not flows:
        return Progress(State.COVERED)  # other policies decide about all of it
    found = _progress(gate, flows)
    unknown = [flow for flow in found.missing if _is_wildcard(gate, flow, policy)]
    if unknown and every:
        missing = tuple(flow for flow in found.missing if flow not in unknown)
        return replace(found, state=found.state if missing else State.COVERED, missing=missing)
    if unknown:
        return replace(found, state=State.NEVER, why=_NO_PEER)
    return found


def wanted(gate: Gate, flow: Flow, child: str) -> tuple[ChildName | None, int] | None:
    """Return which child to ask for, and how often it was asked; None if that cannot help now."""
    found = gate.policy_table.policy_for(flow)
    if gate.ike.problem or found is None:
        return None
    name = _preferred(gate, flow, found[1], child)
    if gate.negotiations.coverage(name) in (Coverage.NEGOTIATING, Coverage.BACK_OFF):
        return None
    item = gate.negotiations.by_child.get(name) if name is not None else None
    return name, item.attempts if item is not None else 0


def negotiation_of(gate: Gate, flow: Flow, child: str) -> ChildName | None:
    """Return the child whose negotiation decides about a flow, None if there is none."""
    found = gate.policy_table.policy_for(flow)
    return _preferred(gate, flow, found[1], child) if found is not None else None


def network_of(gate: Gate, flow: Flow) -> str | None:
    """Return the network of a flow if it is one of several of its policy, else None."""
    found = gate.policy_table.policy_for(flow)
    if found is None or len(found[1].remote) == 1:
        return None
    return next((str(net) for net in found[1].remote if flow.daddr in net), None)


def cause(gate: Gate, progress: Progress) -> Problem:
    """Return why a goal is not reached; its text is "" if it is."""
    if progress.state is State.COVERED:
        return Problem("")
    if progress.why or not progress.missing:
        return Problem(progress.why)
    flow = progress.missing[0]
    found = gate.policy_table.policy_for(flow)
    if found is None or found[1].action is not Action.PROTECT:
        return _unprotected(gate, flow, found[1] if found else None)
    routed = gate.protection.routing.route(flow)
    if routed.reason is not None:
        return no_path(flow, routed)
    policy = replace(found[1], child=progress.child) if progress.child else found[1]
    name = _preferred(gate, flow, found[1], progress.child)
    if name is not None and not gate.ike.problem and gate.protection.is_up(name):
        text = f"{name} is up but does not protect {flow}"
        return Problem(text, "`ipsecgate why` with this destination shows which kernel policy wins")
    return ike_step(gate, policy, name, routed)


def child_sas(gate: Gate, name: str) -> list[ChildSa]:
    """Return the established CHILD_SAs of a child, or those that protect a policy's networks."""
    policy = _policy(gate, name)
    established = gate.protection.established()
    if policy is None or not _is_configured(gate, name):
        named = [sa for sa in established if sa.name.matches(name)]
        if named or policy is None:
            return named
    networks = PrefixSet(policy.remote)
    return [
        sa
        for sa in established
        if (policy.child is None or sa.name.matches(policy.child))
        and any(networks.overlaps(as_prefix(remote.network)) for remote in sa.remote)
    ]


def is_known(gate: Gate, name: str) -> bool:
    """Tell whether a policy or a loaded child has this name."""
    return _policy(gate, name) is not None or any(
        config.name.matches(name) for config in gate.ike.loaded.children
    )


# --- one goal -----------------------------------------------------------------------------------


def _progress(gate: Gate, flows: tuple[Flow, ...]) -> Progress:
    states = [(flow, _state(gate, flow)) for flow in flows]
    missing = tuple(flow for flow, state in states if state is not State.COVERED)
    never = any(state is State.NEVER for _, state in states)
    state = State.NEVER if never else State.WAITING if missing else State.COVERED
    return Progress(state, flows, missing)


def _child_progress(
    gate: Gate, samples: Samples, name: str, children: Sequence[ChildConfig]
) -> Progress:
    flows = samples.of_children(children)
    if not flows:
        return Progress(State.NEVER, why=f"no policy has anything protected by {name}")
    if any(config.wildcard for config in children):
        return Progress(State.NEVER, flows, flows, why=_NO_PEER)
    found = replace(_progress(gate, flows), child=name)
    if all(gate.protection.has_sa(config.name) for config in children):
        return found
    state = State.WAITING if found.state is State.COVERED else found.state
    return replace(found, state=state, missing=flows)


def _state(gate: Gate, flow: Flow) -> State:
    """Return whether a live SA protects a flow, or it never leaves the host."""
    table = gate.policy_table
    if table.content is None:
        return State.WAITING
    if is_exempt(flow):
        return State.COVERED
    found = table.policy_for(flow)
    if found is None:
        return State.NEVER if table.has_own else State.WAITING  # a connection may be loaded yet
    if found[1].action is not Action.PROTECT:
        return State.NEVER
    routed = gate.protection.routing.route(flow)
    if routed.flow.saddr == flow.daddr:
        return State.COVERED
    reason = gate.protection.verdict(routed, derived=found[1].derived)
    return State.COVERED if reason is Reason.ALLOW_COVERED else State.WAITING


def _unprotected(gate: Gate, flow: Flow, policy: Policy | None) -> Problem:
    if policy is not None:
        does = "discards it" if policy.action is Action.DISCARD else "lets it leave unprotected"
        return Problem(f"policy {policy.name} {does}")
    what = "a [[policy]]" if gate.policy_table.has_own else "a connection"
    return Problem(f"no policy protects {flow}", f"add {what} for it")


def _preferred(gate: Gate, flow: Flow, policy: Policy, child: str) -> ChildName | None:
    wanted_policy = replace(policy, child=child) if child else policy
    routed = gate.protection.routing.route(flow)
    return gate.negotiations.preferred(gate.demand.choices(flow, routed, wanted_policy))


def _is_wildcard(gate: Gate, flow: Flow, policy: Policy) -> bool:
    choices = gate.demand.choices(flow, gate.protection.routing.route(flow), policy)
    return bool(choices) and all(config.wildcard for config in choices.values())


def _policy(gate: Gate, name: str) -> Policy | None:
    return next((policy for policy in gate.policies if policy.name == name), None)


def _is_configured(gate: Gate, name: str) -> bool:
    return any(policy.name == name for policy in gate.settings.policies)


def _is_final(gate: Gate, goal: Goal) -> bool:
    """Tell whether a name that nothing has will stay unknown under this configuration."""
    if goal.kind is Kind.NAME:
        return gate.ike.problem is None
    return gate.policy_table.has_own


def _unknown(gate: Gate, goal: Goal) -> str:
    what = "policy and no loaded child" if goal.kind is Kind.NAME else "policy"
    known = [policy.name for policy in gate.policies if policy.action is Action.PROTECT]
    if goal.kind is Kind.NAME:
        known += [str(config.name) for config in gate.ike.loaded.children]
    names = list(dict.fromkeys(known))
    more = f" and {len(names) - _NAMES} more" if names[_NAMES:] else ""
    others = f"; known: {', '.join(names[:_NAMES])}{more}" if names else ""
    return f"no {what} is named {goal.name}{others}"
