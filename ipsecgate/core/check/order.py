"""The order of the operator's policies: the first match wins, so an earlier one may take too much.

A policy that lets flows leave unprotected and stands before one that protects them is a hole, or
an exception that somebody wants.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ipsecgate.core.check.finding import Finding, some, warning
from ipsecgate.core.model.flow import ANY_PORT, PROTOCOL_NAMES, Network
from ipsecgate.core.model.ipsec import Action
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.model.value import value

NAME = "policies"

_EFFECTS = {
    Action.PROTECT: "protects {}",
    Action.BYPASS: "lets {} leave unprotected",
    Action.DISCARD: "discards {}",
}


def check_order(policies: Sequence[Policy]) -> list[Finding]:
    """Judge the order of policies; what is not protected because of it comes first."""
    overtaken = [_overtakes(one) for one in _overtaken(policies) if not one.is_exception]
    return [*overtaken, *_shadowed(policies)]


def exceptions(policies: Sequence[Policy]) -> str:
    """Return which parts of protected networks are exempt, as somebody seems to want."""
    found = some(_exception(one) for one in _overtaken(policies) if one.is_exception)
    return f"; exceptions: {found}" if found else ""


def label(policy: Policy) -> str:
    """Return a policy's name, and where it is written."""
    return f"policy {policy.name}" + (f" ({policy.origin})" if policy.origin else "")


def is_in(network: Network, around: Network) -> bool:
    """Tell whether a network is a part of another, or the same."""
    return network.version == around.version and network.subnet_of(around)  # type: ignore[arg-type]


@value
class Overtaken:
    """What an earlier policy takes of one that protects, and does not protect it.

    `networks`: the parts, or the whole, of its networks. `is_exception`: the earlier policy has a
    protocol, ports or networks that somebody chose for this.
    """

    policy: Policy
    by: Policy
    networks: tuple[Network, ...]
    is_exception: bool


def _overtaken(policies: Sequence[Policy]) -> Iterator[Overtaken]:
    """Yield the policies that protect, of whose flows an earlier policy takes a part.

    It is an exception if it takes fewer protocols or ports, or exactly these and a part of a
    network. If it takes more, somebody may not have thought of the other policy.
    """
    for at, policy in enumerate(policies):
        if policy.action is not Action.PROTECT:
            continue
        for place, by in enumerate(policies[:at]):
            if by.action is Action.PROTECT or _contains(by, policy) or not _shares(by, policy):
                continue
            networks = tuple(
                net
                for net in _common(by, policy)
                if not any(
                    _contains(one, replace(policy, remote=(net,))) for one in policies[:place]
                )
            )
            if networks:
                is_exact = (by.proto, by.ports) == (policy.proto, policy.ports)
                is_part = is_exact and not set(networks) & set(policy.remote)
                is_exception = is_part or not _takes_ports(by, policy)
                yield Overtaken(policy, by, networks, is_exception)


def _overtakes(found: Overtaken) -> Finding:
    by, policy = found.by, found.policy
    flows = f"{_protocol(policy)}to {some(found.networks)}"
    hint = f"move {by.name} after {policy.name}"
    if set(found.networks) & set(policy.remote):
        hint += f"; if that is meant, take the network out of `remote` of {policy.name}"
    else:
        hint += ", or give it a port or a narrower remote"
        if policy.proto:
            hint += f"; if that is meant, give it the protocol and port of {policy.name}"
    return warning(
        NAME,
        f"{label(by)} comes before {label(policy)} and {_EFFECTS[by.action].format(flows)}",
        hint,
    )


def _exception(found: Overtaken) -> str:
    flows = f"{_protocol(found.by)}to {some(found.networks)}"
    effect = _EFFECTS[found.by.action].format(flows)
    return f"{found.by.name} {effect}, before {found.policy.name}"


def _protocol(policy: Policy) -> str:
    """Return protocol and ports of a policy in words, with a space after them."""
    low, high = policy.ports
    port = "" if policy.ports == ANY_PORT else f"{low} " if low == high else f"{low}-{high} "
    name = PROTOCOL_NAMES.get(policy.proto, f"protocol {policy.proto}")
    return f"{name} {port}" if policy.proto else "what goes "


def _shadowed(policies: Sequence[Policy]) -> Iterator[Finding]:
    """Yield the policies that never apply, because an earlier one has all of their flows.

    Those that would protect come first.
    """
    order = sorted(enumerate(policies), key=lambda item: item[1].action is not Action.PROTECT)
    for at, policy in order:
        first = next((one for one in policies[:at] if _contains(one, policy)), None)
        if first is None:
            continue
        is_needed = policy.action is Action.PROTECT or policy.action is not first.action
        yield warning(
            NAME,
            f"{label(policy)} never applies: {label(first)} comes before it and "
            f"{_EFFECTS[first.action].format('all of its flows')}",
            f"move {policy.name} before {first.name}, or remove it"
            if is_needed
            else f"remove {policy.name}: nothing changes without it",
        )


def _contains(outer: Policy, inner: Policy) -> bool:
    return _takes_ports(outer, inner) and all(
        any(is_in(net, around) for around in outer.remote) for net in inner.remote
    )


def _takes_ports(outer: Policy, inner: Policy) -> bool:
    """Tell whether a policy has each protocol and port of another."""
    (first, last), (low, high) = outer.ports, inner.ports
    return outer.proto in (0, inner.proto) and first <= low and high <= last


def _shares(one: Policy, other: Policy) -> bool:
    """Tell whether two policies have a protocol and port in common."""
    (first, last), (low, high) = one.ports, other.ports
    return (0 in (one.proto, other.proto) or one.proto == other.proto) and (
        first <= high and low <= last
    )


def _common(one: Policy, other: Policy) -> Iterator[Network]:
    """Yield the networks that two policies have in common."""
    for net in other.remote:
        for around in one.remote:
            if is_in(net, around):
                yield net
            elif is_in(around, net):
                yield around
