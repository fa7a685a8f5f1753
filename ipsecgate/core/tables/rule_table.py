"""A table made of several owners' rules, changed owner by owner.

    owners      policies, kernel policies, CHILD_SAs: whose rules are assigned and removed together
    the table   for each ternary the best of all owners' entries
    changes     the entries that differ since `changes` was last called

Rules of this module: the work is in proportion to the rules that are assigned. An owner whose rules
do not fit the hooks' maps is closed, alone: another rule refuses the flows that they would let go.
One peer cannot use up the masks, because each peer's rules may bring in only so many.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from itertools import islice
from typing import Any

from ipsecgate.core.tables.layout import ENTRIES, MASKS, Entry, Key
from ipsecgate.core.tables.table import Rule, Table, Ternary, better

Difference = tuple[Entry | None, Entry | None]
"""An entry before and now; None: there is none."""
Rules = tuple[Rule, ...]

ENTRY_LIMIT = ENTRIES // 4  # entries of a table: both may be replaced by as many others at once
MASK_LIMIT = MASKS // 2  # masks of a table: a change may bring in as many, beside the old ones
# Masks that are always allowed: a prefix of whole bytes of the destination, and the family. A rule
# that closes an owner gets the narrowest of them that contains its flows, unless its own mask is
# listed already. Space for them, and for some entries of closed owners, is reserved.
COARSE = frozenset(
    Key(daddr=(1 << 128) - (1 << 128 - bits), family=0xFF) for bits in range(0, 129, 8)
)
COARSE_MASKS = len(COARSE)
COARSE_ENTRIES = 512
NAMES = 8  # in a message
PEER_SHARE = 8  # one peer may bring in one eighth of the masks
RETRIES = 16  # owners that are tried again when there is space


class RuleTable:
    """A table of rules by owner.

    `close` returns the rules of an owner whose own do not fit: they are given coarser masks, so
    they may match more flows, and must refuse what they match.
    """

    def __init__(
        self,
        close: Callable[[Rules], Iterable[Rule]],
        masks: int | None = None,
        entries: int | None = None,
    ) -> None:
        self.table = Table()
        self.closed: dict[Any, tuple[Rules, Hashable]] = {}  # what does not fit, by owner
        self._close = close
        self._masks = (MASK_LIMIT if masks is None else masks) - COARSE_MASKS
        self._entries = (ENTRY_LIMIT if entries is None else entries) - COARSE_ENTRIES
        self._rules: dict[Hashable, Rules] = {}
        # All entries of the ternaries with several, and how many owners have each.
        self._shared: dict[Ternary, Counter[Entry]] = {}
        self._untried = 0  # closed owners that have not been tried since others made space
        self._changed: dict[Ternary, Entry | None] = {}  # as it was before
        self._peer_of: dict[Key, Hashable] = {}  # whose rules brought a mask in
        self._brought: Counter[Hashable] = Counter()

    def assign(self, owner: Hashable, rules: Iterable[Rule], peer: Hashable = None) -> None:
        """Give an owner these rules instead of those that it has; `peer`: who chose their masks."""
        wanted = tuple(rules)
        if self.closed and owner in self.closed and self.closed[owner][0] == wanted:
            return
        before = self.table.size, len(self.table.rows)
        self._assign(owner, wanted, peer)
        if self.table.size < before[0] or len(self.table.rows) < before[1]:
            self._untried = len(self.closed)
        self.retry()

    def retry(self) -> bool:
        """Try some of the closed owners again if others made space; return whether more wait."""
        self._untried = min(self._untried, len(self.closed))
        if not self._untried or not self._has_space:
            return False
        for other in list(islice(self.closed, min(RETRIES, self._untried))):
            self._untried -= 1
            self._assign(other, *self.closed[other])  # one that fails again goes to the end
        return self._untried > 0 and self._has_space

    def changes(self) -> dict[Ternary, Difference]:
        """Return the entries that differ since the last call, before and now."""
        found = {}
        for match, before in self._changed.items():
            now = self.table.get(match)
            if now != before:
                found[match] = before, now
        self._changed = {}
        return found

    @property
    def _has_space(self) -> bool:
        return self._fine_masks < self._masks and self.table.size < self._entries

    @property
    def _fine_masks(self) -> int:
        return len(self.table.rows) - sum(mask in self.table.rows for mask in COARSE)

    def _assign(self, owner: Hashable, wanted: Rules, peer: Hashable) -> None:
        old = self._rules.get(owner, ())
        if self.closed:
            self.closed.pop(owner, None)
        rules = wanted
        if wanted != old and not self._fit(wanted, old, peer):
            self.closed[owner] = wanted, peer
            rules = self._coarse(self._close(wanted))
        if rules == old:
            return
        for rule in rules:
            self._add(rule, peer)
        for rule in old:
            self._remove(rule)
        if rules:
            self._rules[owner] = rules
        else:
            self._rules.pop(owner, None)

    def _fit(self, rules: Rules, old: Sequence[Rule], peer: Hashable) -> bool:
        """Return whether there is space for an owner's rules."""
        if self.table.size + len(rules) - len(old) > self._entries and len(rules) > len(old):
            return False
        rows = self.table.rows
        new = {mask for rule in rules if (mask := rule.match.mask) not in rows} - COARSE
        if not new:
            return True
        if peer is not None and self._brought[peer] + len(new) > self._masks // PEER_SHARE:
            return False
        return self._fine_masks + len(new) <= self._masks

    def _coarse(self, rules: Iterable[Rule]) -> Rules:
        """Return rules that contain these, with masks that are listed or always allowed."""
        rules = tuple(rules)
        wider = tuple(dict.fromkeys(Rule(self._wider(r.match), r.entry) for r in rules))
        if self.table.size + len(wider) <= self._entries:
            return wider
        return tuple(dict.fromkeys(Rule(_around(r.match, 0), r.entry) for r in rules))

    def _wider(self, match: Ternary) -> Ternary:
        if match.mask in self.table.rows:
            return match
        return _around(match, match.mask.daddr.bit_count() // 8 * 8)

    def _add(self, rule: Rule, peer: Hashable) -> None:
        entry = self.table.get(rule.match)
        if entry is None:
            mask = rule.match.mask
            if peer is not None and mask not in self.table.rows and mask not in COARSE:
                self._peer_of[mask] = peer
                self._brought[peer] += 1
            self._put(rule.match, rule.entry)
            return
        if rule.match not in self._shared:
            self._shared[rule.match] = Counter((entry,))
        self._shared[rule.match][rule.entry] += 1
        if better(rule.entry, entry):
            self._put(rule.match, rule.entry)

    def _remove(self, rule: Rule) -> None:
        shared = self._shared.get(rule.match)
        if shared is None:
            self._put(rule.match, None)
            if rule.match.mask not in self.table.rows:
                self._release(rule.match.mask)
            return
        shared[rule.entry] -= 1
        if not shared[rule.entry]:
            del shared[rule.entry]
            if self.table.get(rule.match) == rule.entry:
                best, *others = shared
                for entry in others:
                    best = entry if better(entry, best) else best
                self._put(rule.match, best)
        if len(shared) == 1 and shared.total() == 1:
            del self._shared[rule.match]

    def _release(self, mask: Key) -> None:
        peer = self._peer_of.pop(mask, None)
        if peer is None:
            return
        self._brought[peer] -= 1
        if not self._brought[peer]:
            del self._brought[peer]

    def _put(self, match: Ternary, entry: Entry | None) -> None:
        self._changed.setdefault(match, self.table.get(match))
        self.table.put(match, entry)


def _around(match: Ternary, bits: int) -> Ternary:
    """Return all flows of the family to the destinations that have these first bits."""
    mask = Key(daddr=(1 << 128) - (1 << 128 - bits), family=match.mask.family)
    return Ternary(match.value.masked(mask), mask)


def join_names(owners: Collection[Any], name_of: Callable[[Any], str]) -> str:
    """Return owners' names for a message; beyond `NAMES` only their number."""
    named = list(map(name_of, islice(owners, NAMES)))
    rest = f" and {len(owners) - NAMES} more" if len(owners) > NAMES else ""
    return ", ".join(dict.fromkeys(named)) + rest
