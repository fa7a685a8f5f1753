"""The steps of a decision, and those that the kernel's policies and SAs make."""

from __future__ import annotations

from enum import Enum

from ipsecgate.core.model.flow import Flow
from ipsecgate.core.model.ipsec import Action, Sa, SpdEntry, Template
from ipsecgate.core.state.kernel_state import KernelState
from ipsecgate.core.state.spd import applies, live_rules, unrestricted
from ipsecgate.core.tables.layout import Key, flow_key

SHOWN = 4  # SAs that do not fit, of one template


class Step(Enum):
    """What a step is about."""

    POLICY = "policy"
    EXEMPT = "exempt"
    SOURCE = "source"
    SERVICE = "service"
    KERNEL = "kernel policy"
    SA = "SA"
    IKE = "IKE"


def kernel_steps(state: KernelState, lookup: Flow, *, derived: bool) -> list[tuple[Step, str]]:
    """Return which policies win for a flow, and which of their SAs protect it.

    `derived`: the operator's policy is derived from a connection.
    """
    key = flow_key(lookup)
    winners = state.winners(key)
    if not winners:
        return [(Step.KERNEL, f"none matches: {_nearest(state, lookup, derived=derived)}")]
    steps = [(Step.KERNEL, _describe_entry(entry, derived=derived)) for entry in winners]
    if len(winners) > 1:
        text = "these have the same priority, so the kernel may use any: all must be covered"
        steps.append((Step.KERNEL, text))
    for entry in winners:
        steps += [(Step.SA, text) for text in _sas_of(state, entry, key)]
    return steps


def _nearest(state: KernelState, lookup: Flow, *, derived: bool) -> str:
    """Return the kernel policy to a flow's destination that would match but for one thing."""
    near = [
        entry
        for entry in state.decisive_policies.values()
        if applies(entry) and lookup.daddr in entry.key.selector.dst
    ]
    if not near:
        return "no trap and no SA's policy is installed for this destination"
    # Another source is the common mistake; then protocol, port, mark or interface id differ.
    here = [entry for entry in near if lookup.saddr in entry.key.selector.src]
    entry = min(here or near, key=lambda one: one.priority)
    source = entry.key.selector.src
    but = (
        "its protocol, port, mark or interface differs"
        if here
        else (f"the source {lookup.saddr} is not in {source}")
    )
    return f"the nearest is {_describe_entry(entry, derived=derived)}, but {but}"


def _describe_entry(entry: SpdEntry, *, derived: bool) -> str:
    selector = entry.key.selector
    ports = "".join(
        f" {name} {port}" + ("" if mask == 0xFFFF else f"/{mask:#x}")
        for name, port, mask in (
            ("sport", selector.sport, selector.sport_mask),
            ("dport", selector.dport, selector.dport_mask),
        )
        if mask
    )
    proto = f" proto {selector.proto}" if selector.proto else ""
    flows = f"{selector.src} to {selector.dst}{proto}{ports}, priority {entry.priority}"
    if entry.action is Action.DISCARD:
        return f"{flows}: blocks the flow"
    if entry.action is Action.BYPASS or not entry.templates:
        if derived:
            return f"{flows}: lets the flow leave unprotected, an exception of the connections"
        return f"{flows}: lets the flow leave unprotected, which the policy forbids"
    return flows


def _sas_of(state: KernelState, entry: SpdEntry, key: Key) -> list[str]:
    if entry.action is not Action.PROTECT:
        return []
    texts = []
    for template in entry.templates:
        sas = [sa for sa in state.sas.values() if sa.reqid == template.reqid]
        known = [sa for sa in sas if template.daddr in (None, sa.id.daddr)]
        if not known:
            peer = f" to {template.daddr}" if template.daddr else ""
            texts.append(f"none of reqid {template.reqid}{peer}")
        texts += [f"{sa.id}: {_fit(state, entry, template, sa, key)}" for sa in known[:SHOWN]]
    return texts


def _fit(state: KernelState, entry: SpdEntry, template: Template, sa: Sa, key: Key) -> str:
    """Return whether an SA protects a flow of a policy, and if not, why; decided by `live_rules`.

    With several templates an SA serves one of them, so only all of them together can be judged.
    """
    if not state.is_confirmed(sa):
        return "strongSwan does not list it, so it may be left over from a former daemon"
    if len(entry.templates) > 1:
        return "live"
    for rules, text in (
        (live_rules(entry, lambda _reqid: [sa], state.negotiated), "live, and protects the flow"),
        (
            live_rules(entry, lambda _reqid: [sa], unrestricted),
            "live, but the traffic selectors that the peer agreed to do not contain the flow",
        ),
    ):
        if any(rule.match.matches(key) for rule in rules):
            return text
    if template.spi not in (0, sa.id.spi):
        return f"live, but the policy wants {template.spi:08x}"
    return "live, but it does not fit the policy (mode, endpoints, mark, selector or CPU)"
