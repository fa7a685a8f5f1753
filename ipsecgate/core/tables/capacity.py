"""What becomes of rules that are too many for the hooks' tables: some close, alone.

    spd       a kernel policy or CHILD_SA whose live parts do not fit protects nothing; its
              region stays as it was, so no policy behind it takes its flows over
    policies  a policy that does not fit names more than it should: its networks whole, then
              rounded, at last everything; behind all others, so that these are judged as ever

Rules of this module: nothing is let go that all rules together would not; a flow that matches
nothing that was closed, or widened, is judged as by all of them. Parties that need little come
first, so whoever needs much closes itself: a peer chooses what it negotiates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ipsecgate.core.model.flow import ANY_V4, ANY_V6, Network
from ipsecgate.core.model.ipsec import Action
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.tables.layout import TUPLES, Key, State
from ipsecgate.core.tables.policy_rules import matches, rule_of
from ipsecgate.core.tables.table import (
    LIMIT,
    OverlapIndex,
    Rule,
    Table,
    TableFullError,
    Ternary,
    compile_partial,
    compile_table,
    ternary,
)

BUDGETS = (TUPLES - 2, TUPLES // 2, TUPLES // 4, 0)  # masks for exact policies; two are for all
NAMES = 8  # in one message


# --- the SPD --------------------------------------------------------------------------


@dataclass
class _Need:
    """What an owner's live rules take: masks, theirs and of what must stand before them."""

    masks: set[Key] = field(default_factory=set)
    entries: int = 0


def fit_spd(rules: Sequence[Rule], peer_of: Callable[[Any], Hashable]) -> tuple[Table, list[Any]]:
    """Return a table, and whose live rules are not in it. `peer_of`: who answers for an owner."""
    admitted = _admitted(rules, peer_of)
    kept = [rule for rule in rules if rule.entry.state is not State.LIVE or rule.owner in admitted]
    table, closed = compile_partial(_needed(kept))
    owners = dict.fromkeys(rule.owner for rule in rules if rule.entry.state is State.LIVE)
    return table, [owner for owner in owners if owner not in admitted or owner in closed]


def _admitted(rules: Iterable[Rule], peer_of: Callable[[Any], Hashable]) -> set[Any]:
    """Choose the owners that fit, those of the most modest parties first."""
    needs: dict[Any, _Need] = {}
    before = OverlapIndex()  # what is dead
    for rule in rules:
        if rule.entry.state is not State.LIVE:
            before.add(rule)
            continue
        need = needs.setdefault(rule.owner, _Need())
        need.masks.add(rule.match.mask)
        need.masks.update(before.masks(rule.match))
        need.entries += 1
    parties: dict[Hashable, list[Any]] = {}
    for owner in needs:
        parties.setdefault(peer_of(owner), []).append(owner)

    def modesty(owners: Iterable[Any]) -> tuple[int, int]:
        theirs = [needs[owner] for owner in owners]
        return len(set().union(*(n.masks for n in theirs))), sum(n.entries for n in theirs)

    admitted: set[Any] = set()
    masks: set[Key] = set()
    entries = 0
    for owners in sorted(parties.values(), key=modesty):
        for owner in sorted(owners, key=lambda one: modesty([one])):
            need = needs[owner]
            if len(masks | need.masks) <= TUPLES and entries + need.entries <= LIMIT:
                admitted.add(owner)
                masks |= need.masks
                entries += need.entries
    return admitted


def _needed(rules: Sequence[Rule]) -> list[Rule]:
    """Leave out what is dead and before nothing live: without it there is no entry, or a dead."""
    behind = OverlapIndex()  # what is live
    kept: list[Rule] = []
    for rule in reversed(rules):
        if rule.entry.state is State.LIVE:
            behind.add(rule)
        elif not behind.any(rule.match):
            continue
        kept.append(rule)
    return kept[::-1]


# --- the operator's policies ------------------------------------------------------------


def fit_policies(policies: Sequence[Policy]) -> tuple[Table, list[Policy]]:
    """Return a table, and the policies that name more in it than they should."""
    for budget in BUDGETS:
        widened = _widened(policies, budget)
        try:
            return compile_table(_arranged(policies, widened)), [policies[at] for at in widened]
        except TableFullError:
            continue
    raise AssertionError("two masks fit")


def _widened(policies: Sequence[Policy], budget: int) -> dict[int, list[Ternary]]:
    """Return what the policies that do not fit name instead, by their places.

    Those that need most come first, and none is wider than it must be.
    """
    exact = [matches(policy) for policy in policies]
    needs = [len({match.mask for match in matches}) for matches in exact]
    order = sorted(range(len(policies)), key=lambda at: (-needs[at], -len(exact[at]), -at))
    now = list(exact)
    entries = Counter(match for matches in exact for match in matches)
    masks = Counter(match.mask for match in entries)
    widened: dict[int, list[Ternary]] = {}
    for widen in _WIDTHS:
        for at in order:
            if len(masks) <= budget and len(entries) <= LIMIT - 2:
                return dict(sorted(widened.items()))
            wider = [] if policies[at].action is Action.BYPASS else widen(policies[at].remote)
            if set(wider) != set(now[at]):
                _exchange(entries, masks, now[at], wider)
                widened[at] = now[at] = wider
    return dict(sorted(widened.items()))


def _exchange(
    entries: Counter[Ternary],
    masks: Counter[Key],
    before: Iterable[Ternary],
    now: Iterable[Ternary],
) -> None:
    """Keep the counts, of rules by match and of matches by mask, without those that are 0."""
    for match in before:
        entries[match] -= 1
        if not entries[match]:
            del entries[match]
            masks[match.mask] -= 1
            if not masks[match.mask]:
                del masks[match.mask]
    for match in now:
        masks[match.mask] += match not in entries
        entries[match] += 1


def _whole(networks: Iterable[Network]) -> list[Ternary]:
    """Return networks, whatever protocol and ports."""
    return [ternary(network) for network in dict.fromkeys(networks)]


def _rounded(networks: Iterable[Network]) -> list[Ternary]:
    steps = {4: 8, 6: 16}
    return _whole(
        network.supernet(new_prefix=network.prefixlen - network.prefixlen % steps[network.version])
        for network in networks
    )


def _everything(networks: Iterable[Network]) -> list[Ternary]:
    return _whole(ANY_V4 if network.version == 4 else ANY_V6 for network in networks)


_WIDTHS = (_whole, _rounded, _everything)


def _arranged(policies: Sequence[Policy], widened: dict[int, list[Ternary]]) -> list[Rule]:
    """Return the rules: what was widened is last, and before what is laxer and shares its flows."""
    rules: list[Rule] = []
    wide: list[tuple[Policy, list[Rule], OverlapIndex]] = []
    for place, policy in enumerate(policies):
        if place in widened:
            region = [rule_of(policy, place, match) for match in widened[place]]
            flows = OverlapIndex()
            for match in matches(policy) if region else ():
                flows.add(rule_of(policy, place, match))
            wide.append((policy, region, flows))
            continue
        own = [rule_of(policy, place, match) for match in matches(policy)]
        for other, region, flows in wide:
            if _laxer(policy, other) and any(flows.any(rule.match) for rule in own):
                shared = ((one, one.match.intersect(rule.match)) for one in region for rule in own)
                rules += [replace(one, match=both) for one, both in shared if both is not None]
        rules += own
    # The strictest first: among themselves their order is not that of the policies.
    wide.sort(key=lambda one: one[0].action is not Action.DISCARD)
    return [*rules, *(rule for _, region, _ in wide for rule in region)]


def _laxer(policy: Policy, other: Policy) -> bool:
    if other.action is Action.DISCARD:
        return policy.action is not Action.DISCARD
    return policy.action is Action.BYPASS


def join_names(names: Iterable[str]) -> str:
    """Join distinct names for a message; beyond `NAMES` only their number."""
    distinct = list(dict.fromkeys(names))
    rest = f" and {len(distinct) - NAMES} more" if len(distinct) > NAMES else ""
    return ", ".join(distinct[:NAMES]) + rest
