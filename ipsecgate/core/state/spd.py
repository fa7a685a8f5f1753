"""The SPD joined with the SAD: which flows the kernel would send under a live SA.

Rules of this module (docs/protected.md; random SPDs and SADs are tested against the kernel):
- Which policy wins: that with the lowest priority number. The kernel breaks ties by an order that
  netlink does not show, so where policies of one priority differ, the flow is not protected.
- What protects: the winning policy must ask for ESP or AH, and each template that is not optional
  needs a state with its reqid, protocol, mode and SPI (0: any). In tunnel mode the state's
  endpoints must be the template's. In transport mode they must be those of the tunnel template
  before it or, without one, the flow's own addresses. A state's selector narrows the result.
- Marks: a policy's mark is matched against the flow's, a state's against its policy's.
- Negotiated selectors (`Negotiated`) narrow it further: the peer drops what lies outside them, even
  if the kernel would send it.
- An unbound socket's source port is unknown; it may be any of `EPHEMERAL`. A flow is not protected
  if the answer depends on that port.
- Interface ids: a flow gets one inside an XFRM interface, which the hooks do not see, so policies
  and states with one never match.
- Everything else that wins (a block policy, or one without templates) leaves the flow unprotected.
- Each live rule belongs to its policy (`Rule.owner`): if the hooks' table is too small for all of
  them, all rules of the policy are dropped together.

Source: RFC 4301 section 4.4; xfrm_policy_match(), xfrm_tmpl_resolve_one(), xfrm_state_find().
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from ipaddress import ip_network
from itertools import combinations_with_replacement, groupby

from ipsecgate.core.model.flow import ICMP, PORT_MASK, Address, TrafficSelector
from ipsecgate.core.model.ipsec import AH, ESP, Action, Mode, Sa, SpdEntry, Template
from ipsecgate.core.tables.layout import Entry, Key, State
from ipsecgate.core.tables.table import (
    Rule,
    Ternary,
    common_mask,
    from_selector,
    port_masks,
    ternary,
)

LIVE = Entry(State.LIVE)
DEAD = Entry(State.DEAD)
NEVER = float("inf")

EVERYTHING = Ternary(Key(), Key())
PORT_BLOCKS = (
    8  # a port range that needs more aligned blocks stays as wide as the kernel's selector
)
# The ports that the kernel chooses from: net.ipv4.ip_local_port_range at its default.
EPHEMERAL = range(32768, 61000)
_ENDPOINTS_FROM_TEMPLATE = (Mode.TUNNEL, Mode.BEET, Mode.IPTFS, Mode.UNKNOWN)

Endpoints = tuple[Address | None, Address | None]
"""An SA's source and destination; None: unknown, so no state matches."""
Negotiated = Callable[[Sa, Template], Iterable[Ternary]]
"""Returns the regions that were negotiated for an SA, as used by a template."""
PolicyRules = tuple[Ternary, list[Rule]]
"""A policy's region, and its live rules."""


def unrestricted(_sa: Sa, _template: Template) -> Iterable[Ternary]:
    """Restrict nothing: a `Negotiated` for the kernel's view alone."""
    return (EVERYTHING,)


def spd_rules(
    policies: Iterable[SpdEntry], sas: Iterable[Sa], negotiated: Negotiated = unrestricted
) -> list[Rule]:
    """Return first-match rules that give the kernel's answer, live or dead, for every flow."""
    by_reqid = _index_by_reqid(sas)
    rules: list[Rule] = []
    applicable = sorted(
        # A mark value with bits outside its mask matches no flow.
        (p for p in policies if not p.key.if_id and not p.key.mark.value & ~p.key.mark.mask),
        key=lambda p: p.priority,
    )
    for _, group in groupby(applicable, key=lambda p: p.priority):
        tied = [(region_of(p), live_rules(p, by_reqid, negotiated)) for p in group]
        rules.extend(_disagreements(tied))
        rules.extend(_undecided(region for region, _ in tied))
        for region, live in tied:
            with_source_port = [rule for rule in live if rule.match.mask.sport]
            rules.extend(rule for rule in live if not rule.match.mask.sport)
            rules.extend(_undecided(rule.match for rule in with_source_port))
            rules.extend(with_source_port)
            rules.append(Rule(region, DEAD))
    return rules


def region_of(entry: SpdEntry) -> Ternary:
    """Return the flows that a policy's selector and mark match."""
    mark = entry.key.mark
    return from_selector(entry.key.selector, (mark.value, mark.mask))


def live_rules(
    entry: SpdEntry, by_reqid: Mapping[int, list[Sa]], negotiated: Negotiated = unrestricted
) -> list[Rule]:
    """Return the parts of a policy's region that states protect now, with their deadlines.

    The latest deadline comes first, so it applies where several states protect.
    """
    required = [t for t in entry.templates if not t.optional]
    if entry.action is not Action.PROTECT or not required or entry.key.selector.ifindex:
        return []
    if not any(t.proto in (AH, ESP) for t in required):
        return []  # IPComp alone compresses, but protects nothing
    mark = entry.key.mark
    rules = [Rule(region_of(entry), LIVE)]
    endpoints: Endpoints | None = None  # of the last tunnel template; None: none so far
    for template in entry.templates:
        if template.mode in _ENDPOINTS_FROM_TEMPLATE:
            # An optional tunnel may be left out, which leaves the endpoints unknown.
            endpoints = (None, None) if template.optional else (template.saddr, template.daddr)
        if template.optional:
            continue
        candidates = [
            sa
            for sa in by_reqid.get(template.reqid, ())
            if not sa.if_id and mark.value & mark.mask & sa.mark.mask == sa.mark.value
        ]
        narrowed = [
            _intersection(rule, part)
            for rule in rules
            for part in _protected_by(template, endpoints, candidates, negotiated)
        ]
        rules = [rule for rule in narrowed if rule is not None]
    owned = (replace(rule, owner=entry) for rule in rules)
    return sorted(owned, key=lambda rule: -_deadline(rule))


def _index_by_reqid(sas: Iterable[Sa]) -> dict[int, list[Sa]]:
    index: dict[int, list[Sa]] = {}
    for sa in sas:
        index.setdefault(sa.reqid, []).append(sa)
    return index


def _protected_by(
    template: Template, endpoints: Endpoints | None, sas: Iterable[Sa], negotiated: Negotiated
) -> Iterator[Rule]:
    """Yield the regions for which a state satisfies the template."""
    for sa in sas:
        if sa.larval or sa.mode is Mode.UNKNOWN:
            continue
        if (sa.id.proto, sa.mode) != (template.proto, template.mode):
            continue
        if template.spi not in (0, sa.id.spi):
            continue
        if sa.cpu is not None:
            continue  # the flow's packets may be sent from another CPU
        if sa.selector is not None and sa.selector.ifindex:
            continue  # the flow's outgoing interface is unknown here
        part: Ternary | None
        if endpoints is None:
            part = ternary(ip_network(sa.id.daddr), src=ip_network(sa.saddr))
        elif (sa.saddr, sa.id.daddr) == endpoints:
            part = EVERYTHING
        else:
            continue
        if sa.selector is not None:
            part = part.intersect(from_selector(sa.selector))
        if part is not None:
            live = replace(LIVE, deadline=sa.deadline)
            regions = (part.intersect(region) for region in negotiated(sa, template))
            yield from (Rule(region, live) for region in regions if region is not None)


def _intersection(rule: Rule, part: Rule) -> Rule | None:
    """Return what both match, until the earlier of their deadlines."""
    match = rule.match.intersect(part.match)
    if match is None:
        return None
    return Rule(match, min(rule, part, key=_deadline).entry)


def _deadline(rule: Rule) -> float:
    return rule.entry.deadline or NEVER


def _undecided(matches: Iterable[Ternary]) -> Iterator[Rule]:
    """Yield dead rules for unbound flows that may or may not match, depending on their port.

    At connect() an unbound socket has source port 0. TCP looks up the SPD with 0 and, for IPv4,
    again with the port that the kernel chose; UDP looks it up with the chosen port only.
    """
    for match in matches:
        if match.mask.sport and _may_be_chosen(match.value.sport, match.mask.sport):
            value, mask = replace(match.value, sport=0), replace(match.mask, sport=PORT_MASK)
            yield Rule(Ternary(value, mask), DEAD)


@lru_cache(maxsize=1 << 12)
def _may_be_chosen(value: int, mask: int) -> bool:
    if mask == PORT_MASK:
        return value == 0 or value in EPHEMERAL
    return value == 0 or any(port & mask == value for port in EPHEMERAL)


# --- policies of one priority -----------------------------------------------------------


def _disagreements(tied: list[PolicyRules]) -> Iterator[Rule]:
    """Yield dead rules for the flows of two policies, unless both protect their whole region."""
    regions = {region for region, _ in tied}
    if len(regions) == len(tied) and len({region.mask for region in regions}) == 1:
        return  # distinct values under one mask: no two share a flow
    for (a, a_live), (b, b_live) in _overlapping(tied):
        shared = a.intersect(b)
        both_protect = all(
            region in {rule.match for rule in live} for region, live in ((a, a_live), (b, b_live))
        )
        if shared is not None and not both_protect:
            yield Rule(shared, DEAD)


def _overlapping(tied: list[PolicyRules]) -> Iterator[tuple[PolicyRules, PolicyRules]]:
    """Yield the pairs of policies that share a flow, without comparing every pair."""
    by_mask: dict[Key, list[PolicyRules]] = {}
    for policy in tied:
        by_mask.setdefault(policy[0].mask, []).append(policy)
    for (mask_a, group_a), (mask_b, group_b) in combinations_with_replacement(by_mask.items(), 2):
        common = common_mask(mask_a, mask_b)
        index: dict[Key, list[PolicyRules]] = {}
        for b in group_b:
            index.setdefault(b[0].value.masked(common), []).append(b)
        for a in group_a:
            yield from ((a, b) for b in index.get(a[0].value.masked(common), ()) if a is not b)


# --- negotiated traffic selectors -------------------------------------------------------


@lru_cache(maxsize=1 << 16)
def negotiated_regions(
    local: tuple[TrafficSelector, ...], remote: tuple[TrafficSelector, ...], exact: bool = False
) -> list[Ternary]:
    """Return the flows between local and remote traffic selectors, for each pair of them.

    The kernel's selector rounds a port range up to one mask. Here a range is exact if `PORT_BLOCKS`
    blocks suffice; a wider one, and ICMP types and codes, are left to the kernel's selector. With
    `exact` there is no kernel selector, so every range is exact and a selector with ICMP types or
    codes has no flows.
    """
    return [
        ternary(there.network, src=here.network, proto=here.proto or there.proto,
                sport=sport, dport=dport)
        for there in remote
        for here in local
        if here.network.version == there.network.version
        and (here.proto == there.proto or 0 in (here.proto, there.proto))
        for sport in _port_blocks(here, exact)
        for dport in _port_blocks(there, exact)
    ]  # fmt: skip


def _port_blocks(selector: TrafficSelector, exact: bool) -> list[tuple[int, int]]:
    """Return the ports of a selector as (value, mask) blocks."""
    low, high = selector.ports
    if low > high:
        return []  # OPAQUE
    if (low, high) == (0, PORT_MASK):
        return [(0, 0)]
    if selector.proto in ICMP:
        return [] if exact else [(0, 0)]
    blocks = port_masks(low, high)
    return blocks if exact or len(blocks) <= PORT_BLOCKS else [(0, 0)]
