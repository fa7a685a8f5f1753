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
- Interface ids: a flow gets one inside an XFRM interface; without one it matches only policies and
  states without one. An id that does not fit a flow's key (`IF_IDS`) matches nothing.
- A policy without templates passes flows: they leave unprotected, as whoever installed it wants.
- Everything else that wins (a block policy, or one with optional templates only) protects nothing.

Source: RFC 4301 section 4.4; xfrm_policy_match(), xfrm_tmpl_resolve_one(), xfrm_state_find().
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import IntEnum
from functools import lru_cache
from ipaddress import ip_network

from ipsecgate.core.model.flow import ICMP, PORT_MASK, Address, TrafficSelector
from ipsecgate.core.model.ipsec import (
    AH,
    ESP,
    Action,
    Mode,
    Sa,
    SaId,
    SpdEntry,
    SpdKey,
    Template,
)
from ipsecgate.core.tables.layout import IF_IDS, Entry, Key, State, mix
from ipsecgate.core.tables.table import (
    Rule,
    Ternary,
    from_selector,
    may_be_chosen,
    port_masks,
    ternary,
)

LIVE = Entry(State.LIVE)
DEAD = Entry(State.DEAD)
OPEN = (State.LIVE, State.PASS)
NEVER = 1 << 62  # a deadline, in seconds

EVERYTHING = Ternary(Key(), Key())
# A port range that needs more aligned blocks than this stays as wide as the kernel's selector.
PORT_BLOCKS = 8
_ENDPOINTS_FROM_TEMPLATE = (Mode.TUNNEL, Mode.BEET, Mode.IPTFS, Mode.UNKNOWN)

Endpoints = tuple[Address | None, Address | None]
"""An SA's source and destination; None: unknown, so no state matches."""
Negotiated = Callable[[Sa, Template], Iterable[Ternary]]
"""Returns the regions that were negotiated for an SA, as used by a template."""
SasOf = Callable[[int], Iterable[Sa]]
"""Returns the states of a reqid."""


def unrestricted(_sa: Sa, _template: Template) -> Iterable[Ternary]:
    """Restrict nothing: a `Negotiated` for the kernel's view alone."""
    return (EVERYTHING,)


def applies(entry: SpdEntry) -> bool:
    """Return whether any flow can match a policy."""
    # A mark value with bits outside its mask matches none.
    return entry.key.if_id <= IF_IDS and not entry.key.mark.value & ~entry.key.mark.mask


def passes(entry: SpdEntry) -> bool:
    """Return whether a policy lets its flows leave without an SA."""
    if entry.key.selector.ifindex:
        return False  # only those through that interface, which is unknown here
    return entry.action is not Action.DISCARD and not entry.templates


class _Stage(IntEnum):
    """The order of the rules of policies of one priority."""

    DISAGREEMENT = 0
    UNDECIDED = 1
    SHARED = 2
    LIVE = 3
    UNDECIDED_PORT = 4
    LIVE_PORT = 5
    DEAD = 6


# A rank has 64 bits: 32 of the priority, 3 of the stage, 29 of a SHARED rule's deadline in steps of
# 16 seconds, so that of several such rules the one that ends first wins.
_STAGE_BITS, _DEADLINE_BITS = 3, 29
STEP = 16


def _rank(entry: SpdEntry, stage: _Stage, steps: int = 0) -> int:
    return (entry.priority << _STAGE_BITS | stage) << _DEADLINE_BITS | steps


def priority_of(rank: int) -> int:
    """Return the priority of the policy whose rule has this rank."""
    return rank >> _STAGE_BITS + _DEADLINE_BITS


def rules_of(entry: SpdEntry, sas_of: SasOf, negotiated: Negotiated = unrestricted) -> list[Rule]:
    """Return a policy's rules, with their ranks: the regions where it protects, and the rest."""
    region = region_of(entry.key)
    rules = _undecided([region], _rank(entry, _Stage.UNDECIDED))
    live = live_rules(entry, sas_of, negotiated)
    if live:
        with_port = [rule for rule in live if rule.match.mask.sport]
        without = [rule for rule in live if not rule.match.mask.sport]
        rules += _ranked(without, _rank(entry, _Stage.LIVE))
        matches = (rule.match for rule in with_port)
        rules += _undecided(matches, _rank(entry, _Stage.UNDECIDED_PORT))
        rules += _ranked(with_port, _rank(entry, _Stage.LIVE_PORT))
    # Where all of the region is live, nothing is left: past its deadline the rule is a dead one.
    if not rules or rules[-1].match != region or rules[-1].entry.state is not State.LIVE:
        state = State.PASS if passes(entry) else State.DEAD
        rules.append(Rule(region, _fixed(state, _rank(entry, _Stage.DEAD))))
    return rules


def sa_tag(sa: SaId) -> int:
    """Return the `id` of the entries that are live because of an SA: 32 bits, never 0.

    Two SAs may share one, so it may only serve to close flows.
    """
    daddr = int(sa.daddr)
    return mix(mix(sa.proto << 32 | sa.spi, daddr), daddr >> 64) & 0xFFFFFFFF or 1


def _ranked(live: Iterable[Rule], rank: int) -> list[Rule]:
    return [Rule(r.match, Entry(State.LIVE, 0, r.entry.id, r.entry.deadline, rank)) for r in live]


def _dead(rank: int) -> Entry:
    return _fixed(State.DEAD, rank)


@lru_cache(maxsize=1 << 10)
def _fixed(state: State, rank: int) -> Entry:
    """Return an entry that no SA stands behind; the policies of one priority share theirs."""
    return Entry(state, rank=rank)


def whole_entry(rules: Sequence[Rule]) -> Entry | None:
    """Return the entry of a policy's whole region, None unless all of it is live, or passes.

    `rules` are those of `rules_of`; the last one has the whole region.
    """
    for rule in rules:
        if rule.entry.state in OPEN and rule.match == rules[-1].match:
            return rule.entry
    return None


def shared_rules(
    a: SpdEntry, a_whole: Entry | None, b: SpdEntry, b_whole: Entry | None
) -> list[Rule]:
    """Return the rule for the flows of two policies of one priority, if they share any.

    The kernel may use either policy. So the flows are live while both are live, and pass if both
    let them (`whole_entry`).
    """
    shared = region_of(a.key).intersect(region_of(b.key))
    if shared is None:
        return []
    if a_whole is None or b_whole is None or a_whole.state is not b_whole.state:
        return [Rule(shared, _dead(_rank(a, _Stage.DISAGREEMENT)))]
    if a_whole.state is State.PASS:
        return [Rule(shared, _fixed(State.PASS, _rank(a, _Stage.SHARED)))]
    ends = min(_end(a_whole), _end(b_whole))
    steps = max(1, min(ends // STEP, (1 << _DEADLINE_BITS) - 1))
    until = 0 if ends == NEVER else steps * STEP
    rank = _rank(a, _Stage.SHARED, steps)
    return [Rule(shared, Entry(State.LIVE, id=a_whole.id, deadline=until, rank=rank))]


@lru_cache(maxsize=1 << 10)
def region_of(key: SpdKey) -> Ternary:
    """Return the flows that a policy's selector, mark and interface id match."""
    return from_selector(key.selector, (key.mark.value, key.mark.mask), key.if_id)


def live_rules(entry: SpdEntry, sas_of: SasOf, negotiated: Negotiated = unrestricted) -> list[Rule]:
    """Return the parts of a policy's region that states protect now, with their deadlines.

    The latest deadline comes first, so it applies where several states protect.
    """
    required = [t for t in entry.templates if not t.optional]
    if entry.action is not Action.PROTECT or not required or entry.key.selector.ifindex:
        return []
    if not any(t.proto in (AH, ESP) for t in required):
        return []  # IPComp alone compresses, but protects nothing
    mark = entry.key.mark
    rules = [Rule(region_of(entry.key), LIVE)]
    endpoints: Endpoints | None = None  # of the last tunnel template; None: none so far
    for template in entry.templates:
        if template.mode in _ENDPOINTS_FROM_TEMPLATE:
            # An optional tunnel may be left out, which leaves the endpoints unknown.
            endpoints = (None, None) if template.optional else (template.saddr, template.daddr)
        if template.optional:
            continue
        candidates = [
            sa
            for sa in sas_of(template.reqid)
            if sa.if_id == entry.key.if_id
            and mark.value & mark.mask & sa.mark.mask == sa.mark.value
        ]
        narrowed = [
            _intersection(rule, part)
            for rule in rules
            for part in _protected_by(template, endpoints, candidates, negotiated)
        ]
        rules = [rule for rule in narrowed if rule is not None]
    return sorted(rules, key=lambda rule: -_end(rule.entry))


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
            live = Entry(State.LIVE, id=sa_tag(sa.id), deadline=sa.deadline)
            regions = (part.intersect(region) for region in negotiated(sa, template))
            yield from (Rule(region, live) for region in regions if region is not None)


def _intersection(rule: Rule, part: Rule) -> Rule | None:
    """Return what both match, until the earlier of their deadlines; `part` names the SA."""
    match = rule.match.intersect(part.match)
    if match is None:
        return None
    ends = min(rule.entry.deadline or NEVER, part.entry.deadline or NEVER)
    return Rule(match, Entry(State.LIVE, 0, part.entry.id, 0 if ends == NEVER else ends))


def _end(entry: Entry) -> int:
    return entry.deadline or NEVER


def _undecided(matches: Iterable[Ternary], rank: int) -> list[Rule]:
    """Return dead rules for unbound flows that may or may not match, depending on their port.

    At connect() an unbound socket has source port 0. TCP looks up the SPD with 0 and, for IPv4,
    again with the port that the kernel chose; UDP looks it up with the chosen port only.
    """
    found = []
    for match in matches:
        if match.mask.sport and may_be_chosen(match.value.sport, match.mask.sport):
            value, mask = match.value.replaced(sport=0), match.mask.replaced(sport=PORT_MASK)
            found.append(Rule(Ternary(value, mask), _dead(rank)))
    return found


# --- negotiated traffic selectors -------------------------------------------------------


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
