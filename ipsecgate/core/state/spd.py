"""Which flows the kernel would send under an SA: the SPD joined with the SAD.

Rules of this module (validated against the kernel, see docs/protected.md):
- Lowest priority number wins; ties that disagree count as the stricter one,
  because netlink does not tell the kernel's own order.
- A policy protects when every template that is not optional has a state with
  its reqid, protocol, mode and SPI (0 is any); in tunnel mode the endpoints are
  the template's, in transport mode those of the tunnel before it, else the flow's
  own. A state's selector narrows.
- A source port that the kernel has yet to choose may be any of `EPHEMERAL`: where the
  answer depends on it, the flow is not protected.
- Anything else that wins, BLOCK or no template, leaves the flow unprotected.
- `Negotiated` narrows once more: what the peers agreed on may be less than what the
  kernel would send, and the peer drops the rest.
- A policy's mark is matched against the flow's, a state's against its policy's.
- A rule that lets go is its policy's (`Rule.owner`): where not all fit, it closes as a whole.
- A flow has no interface id (it gets one inside an XFRM interface, which the
  hooks do not see), so policies that ask for one match none.

Source: RFC 4301 section 4.4; xfrm_policy_match(), xfrm_tmpl_resolve_one().
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
PORT_BLOCKS = 8  # a range that takes more is left as wide as the kernel has it
# What the kernel chooses from: net.ipv4.ip_local_port_range as it is where nobody changed it.
EPHEMERAL = range(32768, 61000)
_ENDPOINTS_FROM_TEMPLATE = (Mode.TUNNEL, Mode.BEET, Mode.IPTFS, Mode.UNKNOWN)

Ends = tuple[Address | None, Address | None]
"""Where an SA begins and ends."""
Negotiated = Callable[[Sa, Template], Iterable[Ternary]]
Tied = tuple[Ternary, list[Rule]]
"""A policy's selector, and the live parts of it."""


def whole(_sa: Sa, _template: Template) -> Iterable[Ternary]:
    """Take the kernel's word alone."""
    return (EVERYTHING,)


def by_reqid(sas: Iterable[Sa]) -> dict[int, list[Sa]]:
    """Index states for `live_rules`."""
    index: dict[int, list[Sa]] = {}
    for sa in sas:
        index.setdefault(sa.reqid, []).append(sa)
    return index


def live_rules(
    entry: SpdEntry, sas: Mapping[int, list[Sa]], negotiated: Negotiated = whole
) -> list[Rule]:
    """Return the parts of a policy's selector that live states protect now, and until when.

    The longest-lived come first, so that they answer where several states protect.
    """
    templates = [t for t in entry.templates if not t.optional]
    if entry.action is not Action.PROTECT or not templates or entry.key.selector.ifindex:
        return []
    if not any(t.proto in (AH, ESP) for t in templates):
        return []  # compressed, and readable by everybody
    mark = entry.key.mark
    regions = [Rule(region_of(entry), LIVE)]
    ends: Ends | None = None
    for template in entry.templates:
        if template.mode in _ENDPOINTS_FROM_TEMPLATE:
            # Also of what goes around the tunnel; unknown where it may be left out.
            ends = (None, None) if template.optional else (template.saddr, template.daddr)
        if template.optional:
            continue
        fitting = [
            sa
            for sa in sas.get(template.reqid, ())
            if not sa.if_id and mark.value & mark.mask & sa.mark.mask == sa.mark.value
        ]
        narrowed = [
            _both(region, part)
            for region in regions
            for part in _protected_by(template, ends, fitting, negotiated)
        ]
        regions = [region for region in narrowed if region is not None]
    owned = (replace(region, owner=entry) for region in regions)
    return sorted(owned, key=lambda region: -_end(region))


def _end(region: Rule) -> float:
    return region.entry.deadline or NEVER


def _both(region: Rule, part: Rule) -> Rule | None:
    match = region.match.intersect(part.match)
    if match is None:
        return None
    return Rule(match, min(region, part, key=_end).entry)


def region_of(entry: SpdEntry) -> Ternary:
    """Return the flows that a policy's selector and mark match."""
    mark = entry.key.mark
    return from_selector(entry.key.selector, (mark.value, mark.mask))


def _protected_by(
    template: Template, ends: Ends | None, sas: Iterable[Sa], negotiated: Negotiated
) -> Iterator[Rule]:
    for sa in sas:
        if sa.larval or sa.mode is Mode.UNKNOWN:
            continue
        if (sa.id.proto, sa.mode) != (template.proto, template.mode):
            continue
        if template.spi not in (0, sa.id.spi):
            continue
        if sa.cpu is not None:
            continue  # who asks now may send from another
        if sa.selector is not None and sa.selector.ifindex:
            continue  # by which interface a flow leaves is not known here
        if ends is not None:
            if (sa.saddr, sa.id.daddr) != ends:
                continue
            part: Ternary | None = EVERYTHING
        else:
            part = ternary(ip_network(sa.id.daddr), src=ip_network(sa.saddr))
        if sa.selector is not None and part is not None:
            part = part.intersect(from_selector(sa.selector))
        if part is not None:
            live = replace(LIVE, deadline=sa.deadline)
            agreed = (part.intersect(one) for one in negotiated(sa, template))
            yield from (Rule(one, live) for one in agreed if one is not None)


@lru_cache(maxsize=1 << 16)
def negotiated_regions(
    local: tuple[TrafficSelector, ...], remote: tuple[TrafficSelector, ...], exact: bool = False
) -> list[Ternary]:
    """Return the flows between two sets of traffic selectors, each local with each remote.

    The kernel rounds a port range up to one mask; here it is exact, within `PORT_BLOCKS`.
    ICMP's types and codes stay as the kernel's selector has them. `exact`: there is no
    kernel's selector, so any range is exact, and what names types or codes has no flow.
    """
    return [
        ternary(there.network, src=near.network, proto=near.proto or there.proto,
                sport=sport, dport=dport)
        for there in remote
        for near in local
        if near.network.version == there.network.version
        and (near.proto == there.proto or 0 in (near.proto, there.proto))
        for sport in _blocks(near, exact)
        for dport in _blocks(there, exact)
    ]  # fmt: skip


def _blocks(selector: TrafficSelector, exact: bool) -> list[tuple[int, int]]:
    low, high = selector.ports
    if low > high:
        return []  # OPAQUE: ports that no packet has
    if (low, high) == (0, PORT_MASK):
        return [(0, 0)]
    if selector.proto in ICMP:
        return [] if exact else [(0, 0)]
    blocks = port_masks(low, high)
    return blocks if exact or len(blocks) <= PORT_BLOCKS else [(0, 0)]


def spd_rules(
    policies: Iterable[SpdEntry], sas: Iterable[Sa], negotiated: Negotiated = whole
) -> list[Rule]:
    """Return the kernel's answer for every flow, as first-match rules."""
    index = by_reqid(sas)
    rules: list[Rule] = []
    applicable = sorted(
        (p for p in policies if not p.key.if_id and not p.key.mark.value & ~p.key.mark.mask),
        key=lambda p: p.priority,
    )
    for _, group in groupby(applicable, key=lambda p: p.priority):
        tied = [(region_of(p), live_rules(p, index, negotiated)) for p in group]
        rules.extend(_disagreements(tied))
        rules.extend(_unsettled(selector for selector, _ in tied))
        for selector, regions in tied:
            by_port = [region for region in regions if region.match.mask.sport]
            rules.extend(region for region in regions if not region.match.mask.sport)
            rules.extend(_unsettled(region.match for region in by_port))
            rules.extend(by_port)
            rules.append(Rule(selector, DEAD))
    return rules


def _unsettled(matches: Iterable[Ternary]) -> Iterator[Rule]:
    """Yield the flows of which nobody knows yet whether they will match.

    A socket that is not bound shows source port 0 at connect(). TCP asks the SPD with 0, and
    IPv4 again with the port that the kernel then chooses; UDP asks with that one only.
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


def _disagreements(tied: list[Tied]) -> Iterator[Rule]:
    """Yield what two policies of one priority share, unless both protect all of it."""
    selectors = {selector for selector, _ in tied}
    if len(selectors) == len(tied) and len({selector.mask for selector in selectors}) == 1:
        return  # of one mask and not equal: they have no flow in common
    for (a, a_live), (b, b_live) in _overlapping(tied):
        shared = a.intersect(b)
        if shared is not None and not all(
            whole in {region.match for region in live} for whole, live in ((a, a_live), (b, b_live))
        ):
            yield Rule(shared, DEAD)


def _overlapping(tied: list[Tied]) -> Iterator[tuple[Tied, Tied]]:
    """Yield the pairs that have a flow in common, without looking at every pair."""
    by_mask: dict[Key, list[Tied]] = {}
    for one in tied:
        by_mask.setdefault(one[0].mask, []).append(one)
    for (mask, these), (other, those) in combinations_with_replacement(by_mask.items(), 2):
        common = common_mask(mask, other)
        index: dict[Key, list[Tied]] = {}
        for one in those:
            index.setdefault(one[0].value.masked(common), []).append(one)
        for one in these:
            yield from (
                (one, two) for two in index.get(one[0].value.masked(common), ()) if one is not two
            )
