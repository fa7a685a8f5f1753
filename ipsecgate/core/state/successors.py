"""Which flows are still protected whose SA is gone: a rekeying has put another in its place.

A controller that takes over has not watched it. Until the IKE daemon lists its SAs, the kernel's
databases say whether a policy has a state again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ipsecgate.core.model.ipsec import Direction, SpdEntry
from ipsecgate.core.state.spd import SasOf, live_rules, priority_of, region_of
from ipsecgate.core.tables.layout import Entry
from ipsecgate.core.tables.table import Ternary


def protected_again(
    entries: Mapping[Ternary, Entry], policies: Iterable[SpdEntry], sas_of: SasOf
) -> set[Ternary]:
    """Return those regions of a table that one of these policies protects now.

    It has to be of the priority by which the region had its rank, so it is the same policy or an
    equal. `sas_of`: the states that are there.
    """
    by_priority: dict[int, set[Ternary]] = {}
    for match, entry in entries.items():
        by_priority.setdefault(priority_of(entry.rank), set()).add(match)
    found: set[Ternary] = set()
    for policy in policies:
        wanted = by_priority.get(policy.priority)
        if not wanted or policy.key.direction is not Direction.OUT:
            continue
        region = region_of(policy.key)
        inside = [match for match in wanted if _is_inside(match, region)]
        live = [rule.match for rule in live_rules(policy, sas_of)] if inside else ()
        found.update(match for match in inside if any(_is_inside(match, one) for one in live))
    return found


def _is_inside(match: Ternary, region: Ternary) -> bool:
    return match.intersect(region) == match
