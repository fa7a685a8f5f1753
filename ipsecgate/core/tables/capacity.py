"""Fit too many rules into the hooks' tables: close some flows, and leave all others as they are.

    spd       A kernel policy or CHILD_SA whose live rules do not fit protects nothing. Its region
              stays in the table as dead, so no policy behind it takes over its flows.
    policies  An operator's policy that does not fit is widened: to its networks with every port,
              then to shorter prefixes, then to everything. Widened policies come after all others,
              so flows that match another policy are not affected.

Rules of this module:
- Nothing is allowed that the full set of rules would refuse.
- A flow that matches nothing closed or widened gets the answer of the full set.
- The peers that need the least space come first, so a peer that needs too much closes only its own
  flows. Otherwise a peer could close others' by what it negotiates.
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

# Limits that `_widen` aims at for the number of masks, tried in turn, because `_arrange` may add
# masks. Two are left for policies that are widened to everything, one for each IP version.
BUDGETS = (TUPLES - 2, TUPLES // 2, TUPLES // 4, 0)
NAMES = 8  # in one message


# --- the SPD --------------------------------------------------------------------------


@dataclass
class _Need:
    """The space for an owner's live rules: masks, including those of dead rules before them."""

    masks: set[Key] = field(default_factory=set)
    entries: int = 0


def fit_spd(rules: Sequence[Rule], peer_of: Callable[[Any], Hashable]) -> tuple[Table, list[Any]]:
    """Return a table, and the owners whose live rules are not in it.

    `peer_of` returns the peer of an owner.
    """
    admitted = _admit(rules, peer_of)
    kept = [rule for rule in rules if rule.entry.state is not State.LIVE or rule.owner in admitted]
    table, closed = compile_partial(_without_redundant(kept))
    owners = dict.fromkeys(rule.owner for rule in rules if rule.entry.state is State.LIVE)
    return table, [owner for owner in owners if owner not in admitted or owner in closed]


def _admit(rules: Iterable[Rule], peer_of: Callable[[Any], Hashable]) -> set[Any]:
    """Return the owners that fit, chosen from the smallest peer to the largest."""
    needs: dict[Any, _Need] = {}
    dead = OverlapIndex()
    for rule in rules:
        if rule.entry.state is not State.LIVE:
            dead.add(rule)
            continue
        need = needs.setdefault(rule.owner, _Need())
        need.masks.add(rule.match.mask)
        need.masks.update(dead.masks(rule.match))
        need.entries += 1
    by_peer: dict[Hashable, list[Any]] = {}
    for owner in needs:
        by_peer.setdefault(peer_of(owner), []).append(owner)

    def size(owners: Iterable[Any]) -> tuple[int, int]:
        sizes = [needs[owner] for owner in owners]
        return len(set().union(*(n.masks for n in sizes))), sum(n.entries for n in sizes)

    admitted: set[Any] = set()
    masks: set[Key] = set()
    entries = 0
    for owners in sorted(by_peer.values(), key=size):
        for owner in sorted(owners, key=lambda one: size([one])):
            need = needs[owner]
            if len(masks | need.masks) <= TUPLES and entries + need.entries <= LIMIT:
                admitted.add(owner)
                masks |= need.masks
                entries += need.entries
    return admitted


def _without_redundant(rules: Sequence[Rule]) -> list[Rule]:
    """Drop dead rules that precede no live rule with a common flow.

    Without them such a flow finds a later dead entry or none, and is refused all the same.
    """
    live_behind = OverlapIndex()
    kept: list[Rule] = []
    for rule in reversed(rules):
        if rule.entry.state is State.LIVE:
            live_behind.add(rule)
        elif not live_behind.any(rule.match):
            continue
        kept.append(rule)
    return kept[::-1]


# --- the operator's policies ------------------------------------------------------------


def fit_policies(policies: Sequence[Policy]) -> tuple[Table, list[Policy]]:
    """Return a table, and the policies that are widened in it."""
    for budget in BUDGETS:
        widened = _widen(policies, budget)
        try:
            return compile_table(_arrange(policies, widened)), [policies[at] for at in widened]
        except TableFullError:
            continue
    raise AssertionError("a budget of 0 leaves two masks, which fit")


def _widen(policies: Sequence[Policy], budget: int) -> dict[int, list[Ternary]]:
    """Return what the policies that do not fit match instead, by the policies' places.

    The policies that need the most space are widened first, each no further than necessary. A
    bypass policy is dropped instead, because widening it would let more flows go.
    """
    exact = [matches(policy) for policy in policies]
    needs = [len({match.mask for match in own}) for own in exact]
    order = sorted(range(len(policies)), key=lambda at: (-needs[at], -len(exact[at]), -at))
    current = list(exact)
    entries = Counter(match for own in exact for match in own)
    masks = Counter(match.mask for match in entries)
    widened: dict[int, list[Ternary]] = {}
    for widen in _WIDTHS:
        for at in order:
            if len(masks) <= budget and len(entries) <= LIMIT - 2:
                return dict(sorted(widened.items()))
            wider = [] if policies[at].action is Action.BYPASS else widen(policies[at].remote)
            if set(wider) != set(current[at]):
                _recount(entries, masks, current[at], wider)
                widened[at] = current[at] = wider
    return dict(sorted(widened.items()))


def _recount(
    entries: Counter[Ternary],
    masks: Counter[Key],
    removed: Iterable[Ternary],
    added: Iterable[Ternary],
) -> None:
    """Update the counts of rules by match, and of distinct matches by mask; drop zeros."""
    for match in removed:
        entries[match] -= 1
        if not entries[match]:
            del entries[match]
            masks[match.mask] -= 1
            if not masks[match.mask]:
                del masks[match.mask]
    for match in added:
        masks[match.mask] += match not in entries
        entries[match] += 1


def _all_ports(networks: Iterable[Network]) -> list[Ternary]:
    """Return whole networks, for every protocol and port."""
    return [ternary(network) for network in dict.fromkeys(networks)]


def _shorter_prefixes(networks: Iterable[Network]) -> list[Ternary]:
    """Return the networks with their prefix lengths rounded down to a multiple of 8 (IPv6: 16)."""
    steps = {4: 8, 6: 16}
    return _all_ports(
        network.supernet(new_prefix=network.prefixlen - network.prefixlen % steps[network.version])
        for network in networks
    )


def _everything(networks: Iterable[Network]) -> list[Ternary]:
    return _all_ports(ANY_V4 if network.version == 4 else ANY_V6 for network in networks)


_WIDTHS = (_all_ports, _shorter_prefixes, _everything)


def _arrange(policies: Sequence[Policy], widened: dict[int, list[Ternary]]) -> list[Rule]:
    """Return the rules in order: exact policies as configured, then the widened ones.

    A widened policy must still win over a laxer policy behind it that shares its exact flows, so
    their common region is repeated before the laxer one.
    """
    rules: list[Rule] = []
    wide: list[tuple[Policy, list[Rule], OverlapIndex]] = []
    for place, policy in enumerate(policies):
        if place in widened:
            region = [rule_of(policy, place, match) for match in widened[place]]
            exact_flows = OverlapIndex()
            for match in matches(policy) if region else ():
                exact_flows.add(rule_of(policy, place, match))
            wide.append((policy, region, exact_flows))
            continue
        own = [rule_of(policy, place, match) for match in matches(policy)]
        for other, region, exact_flows in wide:
            if _is_laxer(policy, other) and any(exact_flows.any(rule.match) for rule in own):
                shared = ((one, one.match.intersect(rule.match)) for one in region for rule in own)
                rules += [replace(one, match=both) for one, both in shared if both is not None]
        rules += own
    # Discard first: the widened policies are no longer in their configured order, so the
    # strictest must win.
    wide.sort(key=lambda one: one[0].action is not Action.DISCARD)
    return [*rules, *(rule for _, region, _ in wide for rule in region)]


def _is_laxer(policy: Policy, other: Policy) -> bool:
    """Return whether a policy is less strict than the other."""
    if other.action is Action.DISCARD:
        return policy.action is not Action.DISCARD
    return policy.action is Action.BYPASS


def join_names(names: Iterable[str]) -> str:
    """Join distinct names for a message; beyond `NAMES` only their number."""
    distinct = list(dict.fromkeys(names))
    rest = f" and {len(distinct) - NAMES} more" if len(distinct) > NAMES else ""
    return ", ".join(distinct[:NAMES]) + rest
