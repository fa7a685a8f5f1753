"""The operator's policies against the connections that strongSwan has loaded.

A policy that no connection can serve refuses its flows for ever; a network that a connection
protects and no policy names leaves in clear.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import ip_network, summarize_address_range

from ipsecgate.core.check.finding import Finding, missing, ok, some, warning
from ipsecgate.core.check.order import NAME, check_order, exceptions, is_in, label
from ipsecgate.core.model.flow import Address, Network, TrafficSelector
from ipsecgate.core.model.ipsec import Action, ChildConfig, similar
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.model.value import value

PeerAddresses = Mapping[str, frozenset[Address]]
"""The addresses of each connection's peer, by the connection's name."""


@value
class Reach:
    """Which parts of a network some selectors cover: for all the flows of a policy, or for some."""

    left: tuple[Network, ...]  # what none of them covers for all flows
    is_touched: bool  # some selector covers a part, or some of the flows


def check_policies(
    policies: Sequence[Policy],
    children: Sequence[ChildConfig],
    peers: PeerAddresses,
    *,
    deny: bool = False,
) -> list[Finding]:
    """Judge configured policies. Without one that protects, they are derived and always fit.

    `deny`: what no policy names is refused, not let go.
    """
    found = check_order(policies)
    if any(policy.action is Action.PROTECT for policy in policies):
        for policy in policies:
            found += _served(policy, children) if policy.action is Action.PROTECT else ()
        found += () if deny else _forgotten_families(policies, children)
    found += _forgotten_addresses(children, peers)
    return found or [ok(NAME, "connections and policies agree" + exceptions(policies))]


# --- policies and children --------------------------------------------------------------------


def _served(policy: Policy, children: Sequence[ChildConfig]) -> Iterator[Finding]:
    """Yield what is wrong with the children for a policy that protects."""
    named = [one for one in children if policy.child is None or one.name.matches(policy.child)]
    if policy.child is not None and not named:
        loaded = some(one.name for one in children) or "none"
        meant = similar(policy.child, (one.name for one in children))
        ask = f"did you mean {meant}? Then " if meant else ""
        yield missing(
            NAME,
            f"{label(policy)} needs the child {policy.child}, which strongSwan has not loaded: its "
            "flows are refused",
            f"{ask}correct `child` (loaded: {loaded}); else load it: `swanctl --load-conns`",
        )
        return
    if policy.child is not None and not all(one.remote for one in named):
        return  # its selector is the peer's address, which is known when it is up
    selectors = [selector for one in named for selector in one.remote]
    reaches = {network: reach(policy, network, selectors) for network in policy.remote}
    whose = f"the child {policy.child}" if policy.child else "no loaded connection"
    verb = "does not protect" if policy.child else "protects"
    gone = [net for net, found in reaches.items() if found.left and not found.is_touched]
    if gone:
        yield missing(
            NAME,
            f"{label(policy)}: {whose} {verb} {some(gone)}, so flows there are refused",
            "load its connection with `swanctl --load-conns`, add the network to remote_ts, or "
            "take it out of the policy",
        )
    left = [part for found in reaches.values() if found.is_touched for part in found.left]
    if left:
        yield warning(
            NAME,
            f"{label(policy)}: for all of its flows {whose} {verb} {some(left)}; those that have "
            "no selector are refused",
            "widen remote_ts, or narrow `remote`, `protocol` or `port` of the policy",
        )


def reach(policy: Policy, network: Network, selectors: Iterable[TrafficSelector]) -> Reach:
    """Return which parts of a policy's network these selectors cover."""
    first, last = int(network[0]), int(network[-1])
    near = [one for one in selectors if one.network.version == network.version]
    near = [one for one in near if one.network.overlaps(network)]
    spans = sorted(
        (max(first, int(one.network[0])), min(last, int(one.network[-1])))
        for one in near
        if _has_all(one, policy)
    )
    left: list[Network] = []
    for low, high in (*spans, (last + 1, last + 1)):
        if low > first:
            left += _between(network, first, low - 1)
        first = max(first, high + 1)
    touched = any(_has_some(one, policy) for one in near)
    return Reach(tuple(left), touched)


def _between(network: Network, first: int, last: int) -> Iterator[Network]:
    kind = type(network[0])
    yield from summarize_address_range(kind(first), kind(last))


def _has_all(selector: TrafficSelector, policy: Policy) -> bool:
    """Tell whether a selector takes each protocol and port of a policy."""
    (low, high), (first, last) = selector.ports, policy.ports
    return selector.proto in (0, policy.proto) and low <= first and last <= high


def _has_some(selector: TrafficSelector, policy: Policy) -> bool:
    (low, high), (first, last) = selector.ports, policy.ports
    common = 0 in (selector.proto, policy.proto) or selector.proto == policy.proto
    return common and low <= last and first <= high


# --- the other address family -----------------------------------------------------------------


def _forgotten_families(
    policies: Sequence[Policy], children: Sequence[ChildConfig]
) -> Iterator[Finding]:
    """Yield children of both families of which the policies name only one."""
    for child in children:
        named: dict[int, bool] = {}  # by IP version
        for selector in child.remote:
            version: int = selector.network.version
            hit = any(
                net.version == version and net.overlaps(selector.network) and _has_some(selector, p)
                for p in policies
                for net in p.remote
            )
            named[version] = named.get(version, False) or hit
        if set(named.values()) == {True, False}:
            version = min(named, key=lambda number: named[number])
            nets = [one.network for one in child.remote if one.network.version == version]
            yield warning(
                NAME,
                f"no policy names IPv{version} of {child.name}: what goes to {some(nets)} leaves "
                "in clear while no SA is up",
                f"add {some(f'{str(net)!r}' for net in nets)} to `remote` of the policy for it",
            )


def _forgotten_addresses(
    children: Sequence[ChildConfig], peers: PeerAddresses
) -> Iterator[Finding]:
    """Yield the addresses of a protected peer host that no selector contains."""
    selectors = {selector.network for child in children for selector in child.remote}
    for child in children:
        addresses = peers.get(child.name.ike, frozenset())
        if not any(
            ip_network(address) in {s.network for s in child.remote} for address in addresses
        ):
            continue  # it protects networks behind the peer, not the peer
        bare = [a for a in addresses if not any(is_in(ip_network(a), net) for net in selectors)]
        if bare:
            yield warning(
                NAME,
                f"{child.name} protects its peer at one address only: what goes to {some(bare)} "
                "leaves in clear",
                f"add {some(bare)} to remote_ts, or a child for that address",
            )
