"""Which flows the kernel would send under an SA: the SPD joined with the SAD.

Rules of this module (validated against the kernel, see docs/protected.md):
- Lowest priority number wins; ties that disagree count as the stricter one,
  because netlink does not tell the kernel's own order.
- A policy protects when every template that is not optional has a state with
  its reqid, protocol, mode and SPI (0 is any); in tunnel mode the endpoints are
  the template's, in transport mode the flow's own. A state's selector narrows.
- Anything else that wins, BLOCK or no template, leaves the flow unprotected.
- A policy's mark is matched against the flow's, a state's against its policy's.
- A flow has no interface id (it gets one inside an XFRM interface, which the
  hooks do not see), so policies that ask for one match none.

Source: RFC 4301 section 4.4; xfrm_policy_match(), xfrm_tmpl_resolve_one().
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from ipaddress import ip_network
from itertools import combinations, groupby

from ipsecgate.core.ipsec import Action, Mode, Sa, SpdEntry, Template
from ipsecgate.core.layout import Entry, Key, State
from ipsecgate.core.table import Rule, Ternary, from_selector, ternary

LIVE = Entry(State.LIVE)
DEAD = Entry(State.DEAD)

_EVERYTHING = Ternary(Key(), Key())
_ENDPOINTS_FROM_TEMPLATE = (Mode.TUNNEL, Mode.BEET)


def by_reqid(sas: Iterable[Sa]) -> dict[int, list[Sa]]:
    """Index states for `live_regions`."""
    index: dict[int, list[Sa]] = {}
    for sa in sas:
        index.setdefault(sa.reqid, []).append(sa)
    return index


def live_regions(entry: SpdEntry, sas: Mapping[int, list[Sa]]) -> list[Ternary]:
    """Return the parts of a policy's selector that live states protect now."""
    templates = [t for t in entry.templates if not t.optional]
    if entry.action is not Action.PROTECT or not templates or entry.key.selector.ifindex:
        return []
    mark = entry.key.mark
    regions = [region_of(entry)]
    for template in templates:
        fitting = [
            sa
            for sa in sas.get(template.reqid, ())
            if not sa.if_id and mark.value & mark.mask & sa.mark.mask == sa.mark.value
        ]
        narrowed = [
            region.intersect(part)
            for region in regions
            for part in _protected_by(template, fitting)
        ]
        regions = [region for region in narrowed if region is not None]
    return regions


def region_of(entry: SpdEntry) -> Ternary:
    """Return the flows that a policy's selector and mark match."""
    mark = entry.key.mark
    return from_selector(entry.key.selector, (mark.value, mark.mask))


def _protected_by(template: Template, sas: Iterable[Sa]) -> Iterator[Ternary]:
    for sa in sas:
        if sa.larval or (sa.id.proto, sa.mode) != (template.proto, template.mode):
            continue
        if template.spi not in (0, sa.id.spi):
            continue
        if template.mode in _ENDPOINTS_FROM_TEMPLATE:
            if (sa.saddr, sa.id.daddr) != (template.saddr, template.daddr):
                continue
            part: Ternary | None = _EVERYTHING
        else:
            part = ternary(ip_network(sa.id.daddr), src=ip_network(sa.saddr))
        if sa.selector is not None and part is not None:
            part = part.intersect(from_selector(sa.selector))
        if part is not None:
            yield part


def spd_rules(policies: Iterable[SpdEntry], sas: Iterable[Sa]) -> list[Rule]:
    """Return the kernel's answer for every flow, as first-match rules."""
    index = by_reqid(sas)
    rules: list[Rule] = []
    applicable = sorted(
        (p for p in policies if not p.key.if_id and not p.key.mark.value & ~p.key.mark.mask),
        key=lambda p: p.priority,
    )
    for _, group in groupby(applicable, key=lambda p: p.priority):
        tied = [(region_of(p), live_regions(p, index)) for p in group]
        rules.extend(_disagreements(tied))
        for selector, regions in tied:
            rules.extend(Rule(region, LIVE) for region in regions)
            rules.append(Rule(selector, DEAD))
    return rules


def _disagreements(tied: list[tuple[Ternary, list[Ternary]]]) -> Iterator[Rule]:
    """Yield what two policies of one priority share, unless both protect all of it."""
    selectors = {selector for selector, _ in tied}
    if len(selectors) == len(tied) and len({selector.mask for selector in selectors}) == 1:
        return  # of one mask and not equal: they have no flow in common
    for (a, a_live), (b, b_live) in combinations(tied, 2):
        shared = a.intersect(b)
        if shared is not None and not (a in a_live and b in b_live):
            yield Rule(shared, DEAD)
