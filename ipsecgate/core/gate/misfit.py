"""Why no child would protect a flow, or one that is up does not, and what to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from ipsecgate.core.gate.ike import LoadedChildren
from ipsecgate.core.model.flow import Flow
from ipsecgate.core.model.ipsec import ChildConfig, similar
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.model.problem import Cause, Problem

SHOWN = 3  # networks or names in one line
NONE = "no loaded connection has the flow in its traffic selectors"
_UP = "strongSwan reports it as up, but "


def wrong_source(config: ChildConfig, routed: Flow) -> str:
    """Return that a flow's source is outside a child's local selectors; "" if it is inside."""
    near = [one.network for one in config.local]
    if not near or routed.saddr is None or any(routed.saddr in network for network in near):
        return ""
    return (
        f"the source {routed.saddr} is not in the local selector {_some(near)} "
        f"(local_ts of {config.name})"
    )


def useless(config: ChildConfig | None, flow: Flow, routed: Flow) -> Cause:
    """Return why a child that IKE reports up does not protect the flow that asked for it."""
    wrong = wrong_source(config, routed) if config is not None else ""
    if config is not None and wrong:
        near = _some([one.network for one in config.local])
        return Cause(
            _UP + wrong,
            f"the peer agrees with {near}: change local_ts here and remote_ts on the peer, or give "
            f"this host an address in {near}",
        )
    return Cause(
        f"{_UP}no SA protects {flow}",
        "compare the child's traffic selectors (`swanctl --list-sas`) with the flow, and see "
        "`ip xfrm policy`",
    )


def no_child(loaded: LoadedChildren, policy: Policy, routed: Flow) -> Problem:
    """Return why no loaded child would protect a flow."""
    if policy.child is not None and not loaded.named_as(policy.child):
        return absent_child(loaded, policy)
    wrong = (wrong_source(config, routed) for config in loaded.towards(routed, policy))
    if text := next(filter(None, wrong), ""):
        return Problem(
            text,
            "bind the socket to an address in the local selector, or change local_ts here and "
            "remote_ts on the peer",
        )
    if policy.child is not None:
        return Problem(
            f"the child {policy.child} does not have the flow in its traffic selectors",
            f"see `swanctl --list-conns`; widen its selectors on both sides, or correct `child` of "
            f"policy {policy.name}",
        )
    return Problem(
        NONE,
        "`swanctl --list-conns` lists those that are loaded: load the one that is missing with "
        "`swanctl --load-conns`, or compare its local and remote selectors with the flow",
    )


def absent_child(loaded: LoadedChildren, policy: Policy) -> Problem:
    """Return that the child which a policy names is not loaded."""
    names = [str(config.name) for config in loaded.children]
    where = f" ({policy.origin})" if policy.origin else ""
    text = (
        f"policy {policy.name}{where} needs the child {policy.child}, which strongSwan has not "
        f"loaded (loaded: {_some(names) or 'none'})"
    )
    meant = similar(policy.child or "", [config.name for config in loaded.children])
    ask = f"did you mean {meant}? Then " if meant else ""
    advice = f"correct `child` of policy {policy.name}; else load it: `swanctl --load-conns`"
    return Problem(text, ask + advice)


def absent_children(loaded: LoadedChildren, policies: Iterable[Policy]) -> list[Problem]:
    """Return the same for the first few policies that name a child which is not loaded."""
    absent = (one for one in policies if one.child is not None and not loaded.named_as(one.child))
    return [absent_child(loaded, policy) for policy in islice(absent, SHOWN)]


def _some(items: Sequence[object]) -> str:
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(map(str, items[:SHOWN])) + more
