"""Why a flow is let go or refused: the decision step by step, and the next thing to do.

The steps are those of the hooks (bpf/gate.bpf.c): policy, exemptions, source, the kernel policy
that wins, its SA. The verdict is the tables', which the hooks search; the steps only explain it.

Rules of this module: it changes nothing and asks for nothing.
"""

from __future__ import annotations

from ipsecgate.core.codec.causes import ANSWERS
from ipsecgate.core.gate.coverage import Coverage
from ipsecgate.core.gate.gate import Gate
from ipsecgate.core.gate.kernel_steps import Step, kernel_steps
from ipsecgate.core.gate.misfit import no_child, wrong_source
from ipsecgate.core.gate.negotiation import Negotiation
from ipsecgate.core.gate.routing import Routed
from ipsecgate.core.model.flow import ANY_PORT, ANY_V4, ANY_V6, Flow, is_exempt
from ipsecgate.core.model.ipsec import Action, ChildConfig, ChildName
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.model.problem import Problem
from ipsecgate.core.model.value import value
from ipsecgate.core.nat.local import SPARE
from ipsecgate.core.tables.layout import Reason, flow_key


@value
class Explanation:
    """The verdict about a flow, and how it comes about. `error`: the errno, 0 if it is let go."""

    reason: Reason
    steps: tuple[tuple[Step, str], ...]
    error: int = 0
    advice: str = ""

    @property
    def is_allowed(self) -> bool:
        """Tell whether the hooks let the flow go."""
        return self.reason < Reason.REFUSE_UNCOVERED


def explain(gate: Gate, flow: Flow) -> Explanation:
    """Return why the hooks would allow or refuse a flow of a gated process."""
    table = gate.policy_table
    if table.content is None:
        text = "none is known yet: no [[policy]] is configured, and no connection was ever loaded"
        advice = "load a connection (`swanctl --load-conns`), or configure a [[policy]]"
        error = table.settings.errnos.uncovered
        if is_exempt(flow):
            return Explanation(Reason.ALLOW_EXEMPT, ((Step.EXEMPT, _exemption(flow)),))
        return Explanation(Reason.REFUSE_NOT_READY, ((Step.POLICY, text),), error, advice)
    found = table.policy_for(flow)
    steps = [(Step.POLICY, describe(found[1]) if found else "none names this flow")]
    policy = found[1] if found else None
    if policy is not None and policy.action is Action.BYPASS:
        return Explanation(Reason.ALLOW_BYPASS, tuple(steps))
    if policy is None and not table.settings.deny:
        return Explanation(Reason.ALLOW_DEFAULT, tuple(steps))
    if is_exempt(flow):
        return Explanation(Reason.ALLOW_EXEMPT, (*steps, (Step.EXEMPT, _exemption(flow))))
    if policy is None:
        error = table.settings.errnos.uncovered
        advice = 'add a [[policy]] for it, with action = "bypass" if it may leave unprotected'
        return Explanation(Reason.REFUSE_DEFAULT, tuple(steps), error, advice)
    entry = table.content.classify(flow_key(flow))
    error = entry.error if entry is not None else 0
    if policy.action is Action.DISCARD:
        return Explanation(Reason.REFUSE_DISCARD, tuple(steps), error)
    return _protected(gate, flow, policy, steps, error)


def _protected(
    gate: Gate, flow: Flow, policy: Policy, steps: list[tuple[Step, str]], error: int
) -> Explanation:
    """Explain the verdict about a flow that must be protected."""
    routed = gate.protection.routing.route(flow)
    if routed.reason is not None:
        unknown = no_path(flow, routed)
        steps.append((Step.SOURCE, unknown.text))
        return Explanation(routed.reason, tuple(steps), error, unknown.advice)
    steps += _path_steps(flow, routed)
    if routed.flow.saddr == flow.daddr:
        steps.append((Step.EXEMPT, "it is the host's own address, so no packet leaves the host"))
        return Explanation(Reason.ALLOW_EXEMPT, tuple(steps))
    services = gate.protection.services
    for backend in services.backends(flow, routed.flow.saddr):
        text = f"becomes {backend}, by {services.rule_for(flow)}"
        steps.append((Step.SERVICE, f"{text}; {_state(gate, backend)}"))
    if gate.protection.in_userspace:
        steps.append((Step.SA, "strongSwan does ESP by itself: its CHILD_SAs and routes count"))
    else:
        for lookup in routed.lookups:
            steps += kernel_steps(gate.protection.kernel_state, lookup, derived=policy.derived)
    reason = gate.protection.verdict(routed, derived=policy.derived)
    if reason < Reason.REFUSE_UNCOVERED:
        return Explanation(reason, tuple(steps))
    choices = gate.demand.choices(flow, routed, policy)
    preferred = gate.negotiations.preferred(choices)
    missing = ike_step(gate, policy, preferred, routed)
    text, advice = missing.text, missing.advice
    config = choices[preferred] if preferred is not None else None
    if _is_moved_away(routed, config):
        advice = f"NAT rule {routed.path.rule}: {SPARE}" if routed.path else advice
    wrong = wrong_source(config, routed.last) if config is not None else ""
    steps.append((Step.IKE, f"{text}; {wrong}" if wrong and wrong not in text else text))
    if config is not None and _is_of_identity(gate, preferred):
        steps.append((Step.IKE, _expects(config)))
    for name in choices if len(choices) > 1 else ():
        if name != preferred and (other := gate.negotiations.by_child.get(name)):
            steps.append((Step.IKE, _describe_negotiation(name, other)))
    if deadlock := gate.lookups.problem(flow):
        steps.append((Step.IKE, deadlock.text))
        advice = deadlock.advice
    return Explanation(Reason.REFUSE_UNCOVERED, tuple(steps), error, advice)


def _is_moved_away(routed: Routed, config: ChildConfig | None) -> bool:
    """Tell whether a rule of NAT gives a flow a source that the child for it does not protect."""
    source = routed.last.saddr
    if routed.path is None or not routed.path.rule or source is None:
        return False
    return config is None or not any(source in one.network for one in config.local)


def _state(gate: Gate, backend: Flow) -> str:
    covered = gate.protection.is_live(backend)
    return "a live SA protects that" if covered else "no live SA protects that: see `why` for it"


def no_path(flow: Flow, routed: Routed) -> Problem:
    """Return why a flow's path is unknown."""
    if routed.path is not None and routed.path.outside:
        return Problem(routed.path.outside)
    if routed.reason is Reason.REFUSE_NETNS:
        text = "the routes of its network namespace are not known yet"
        return Problem(text, "try again in a moment")
    if routed.path is None and (flow.mark or flow.device):
        what = " and ".join(
            text
            for text, number in ((f"mark {flow.mark:#x}", flow.mark), ("device", flow.device))
            if number
        )
        return Problem(f"the routes for its {what} are not known yet", "try again in a moment")
    if routed.path is not None and routed.path.source is not None:
        text = f"{flow.saddr}, whose route is not certain: routing chooses {routed.path.source}"
        return Problem(text, f"bind the socket to {routed.path.source}, or to no address")
    if flow.device and flow.daddr.version == 6 and not flow.netns:
        text = "unknown: routing has no way to this destination, or out of the device's VRF"
        return Problem(
            text, "bind the socket to an address, or set `src` of the route to one of the VRF"
        )
    advice = f"see `ip route get {flow.daddr}`, or bind the socket to an address"
    return Problem("unknown: routing has no way to this destination", advice)


def _path_steps(flow: Flow, routed: Routed) -> list[tuple[Step, str]]:
    how = "that of the socket" if flow.saddr is not None else "chosen by routing"
    steps = [(Step.SOURCE, f"{routed.flow.saddr}, {how}")]
    path = routed.path
    if path is not None and path.translated is not None:
        who = f"the NAT rule {path.rule}" if path.rule else "the host"
        text = f"{path.translated}, as {who} translates it; then the kernel looks again"
        steps.append((Step.SOURCE, text))
    if path is not None and path.is_tunneled:
        key = f"interface id {path.if_id}" if path.if_id else f"mark {path.mark:#x}"
        steps.append((Step.SOURCE, f"through a tunnel device, which looks for its {key}"))
    return steps


def describe(policy: Policy) -> str:
    """Return a policy in words, with its place in the configuration."""
    remote = " ".join(map(str, policy.remote))
    if set(policy.remote) >= {ANY_V4, ANY_V6}:
        remote = "everything"
    verb = {Action.PROTECT: "protects", Action.BYPASS: "exempts", Action.DISCARD: "discards"}
    protocol = {0: "", 6: " tcp", 17: " udp"}.get(policy.proto, f" protocol {policy.proto}")
    ports = _in_words("port", policy.ports) + _in_words("from port", policy.local_ports)
    where = policy.origin or "derived from strongSwan's connections"
    return f"{policy.name} {verb[policy.action]}{protocol} {remote}{ports} ({where})"


def _in_words(name: str, ports: tuple[int, int]) -> str:
    low, high = ports
    return "" if ports == ANY_PORT else f" {name} {low}" + (f"-{high}" * (high != low))


def _exemption(flow: Flow) -> str:
    loopback = flow.daddr.is_loopback or flow.daddr.is_unspecified
    return "loopback never leaves the host" if loopback else "DHCP stays on the link"


# --- IKE --------------------------------------------------------------------------------------


def ike_step(gate: Gate, policy: Policy, name: ChildName | None, routed: Routed) -> Problem:
    """Return the state of the negotiation that would cover a flow."""
    if gate.ike.problem is not None:
        return gate.ike.problem
    if name is None:
        return no_child(gate.ike.loaded, policy, routed.last)
    negotiation = gate.negotiations.by_child.get(name)
    if negotiation is None:
        command = f"ipsecgate up {name if policy.derived else policy.name}"
        if name.part is not None:  # only a flow says which
            command = "ipsecgate wait --to HOST:PORT"
        advice = f"`{command}` negotiates it now, else the first refused call does"
        return Problem(f"child {name} was not asked for yet", advice)
    text = _describe_negotiation(name, negotiation)
    if negotiation.last_error is not None and negotiation.last_error.advice:
        return Problem(text, negotiation.last_error.advice)
    if negotiation.coverage is Coverage.NEGOTIATING:
        advice = f"IKE is under way; if it takes more than a few seconds, {ANSWERS}"
        return Problem(text, advice)
    if name.part is not None:
        return Problem(text, "see strongSwan's log, and the last error above")
    command = f"swanctl --initiate --ike {name.ike} --child {name.child}"
    return Problem(text, f"`{command}` shows the negotiation")


def _is_of_identity(gate: Gate, name: ChildName | None) -> bool:
    """Tell whether a child failed because one side did not accept who the other is."""
    item = gate.negotiations.by_child.get(name) if name is not None else None
    return item is not None and item.last_error is not None and item.last_error.is_identity


def _expects(config: ChildConfig) -> str:
    who = config.peer_id or "anybody: `remote` has no `id`"
    by = f", by {config.peer_auth}" if config.peer_auth else ""
    return f"connection {config.name.ike} expects the peer to prove that it is {who}{by}"


def _describe_negotiation(name: ChildName, negotiation: Negotiation) -> str:
    count = negotiation.attempts
    attempts = "1 attempt" if count == 1 else f"{count} attempts"
    text = f"child {name}: {negotiation.coverage.value}, {attempts}"
    if negotiation.last_error is None:
        return text
    return f"{text}; last error: {negotiation.last_error.text}"
