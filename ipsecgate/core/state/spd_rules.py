"""The kernel's answers as rules, kept up to date policy by policy.

    a notification  ->  the policies that it affects  ->  their rules

A policy's rules depend on the policy, on the SAs of its templates' reqids, on the policies of the
same priority that share flows with it and, if a template names no SPI, on the other policies of
its reqid that do. So the work is in proportion to what the change concerns.

Rules of this module: `put`, `remove` and `sas_changed` mark policies; `take` makes their rules.
What may close a flow is taken first, and each mark waits its turn: a flood cannot delay it forever.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence

from ipsecgate.core.model.ipsec import SpdEntry, SpdKey
from ipsecgate.core.state.groups import Groups
from ipsecgate.core.state.spd import (
    Negotiated,
    SasOf,
    applies,
    region_of,
    rules_of,
    shared_rules,
    whole_entry,
)
from ipsecgate.core.tables.layout import Entry, Key
from ipsecgate.core.tables.table import Rule, Ternary


class SpdRules:
    """The rules of every outbound policy. Their owner is a policy's key, or the keys of two."""

    def __init__(self) -> None:
        self.policies: dict[SpdKey, SpdEntry] = {}
        self._by_reqid: Groups[int, SpdKey] = Groups()
        self._without_spi: Groups[int, SpdKey] = (
            Groups()
        )  # those with a template that any SPI satisfies
        self._neighbours: dict[int, _Neighbours] = {}  # by priority
        # Of each policy whose rules were made: the entry of its whole region.
        self._whole: dict[SpdKey, Entry | None] = {}
        self._left: set[SpdKey] = set()  # removed, but their rules are still out
        self._pairs: dict[SpdKey, set[SpdKey]] = {}
        self._closing: OrderedDict[SpdKey, None] = OrderedDict()  # marked: they lost something
        self._marked: OrderedDict[SpdKey, None] = OrderedDict()  # marked: all others

    # --- marks ----------------------------------------------------------------------

    def put(self, entry: SpdEntry) -> None:
        """Add or replace a policy."""
        old = self.policies.get(entry.key)
        if old == entry:
            return
        if old is not None:
            self.remove(entry.key)
        self.policies[entry.key] = entry
        for template in entry.templates:
            self._by_reqid.add(template.reqid, entry.key)
            if not template.spi:
                self._without_spi.add(template.reqid, entry.key)
        self._mark_users(entry, closing=False)
        self._mark(entry.key, closing=False)

    def remove(self, key: SpdKey) -> None:
        """Remove a policy."""
        entry = self.policies.pop(key, None)
        if entry is None:
            return
        for template in entry.templates:
            self._by_reqid.discard(template.reqid, key)
            self._without_spi.discard(template.reqid, key)
        if key in self._whole:
            del self._whole[key]
            self._left.add(key)
            self._neighbours[entry.priority].remove(key, region_of(entry.key))
            if not self._neighbours[entry.priority]:
                del self._neighbours[entry.priority]
        self._mark_users(entry, closing=True)
        if key in self._left or key in self._pairs:
            self._mark(key, closing=True)
        else:  # its rules were never made
            self._closing.pop(key, None)
            self._marked.pop(key, None)

    def sas_changed(self, reqids: Iterable[int], *, closing: bool) -> None:
        """Mark the policies of these reqids; `closing`: their SAs are gone, or not confirmed."""
        for reqid in reqids:
            for key in self._by_reqid.of(reqid):
                self._mark(key, closing=closing)

    def _mark_users(self, entry: SpdEntry, *, closing: bool) -> None:
        """Mark the policies that learn from this one for which flows an SA was negotiated."""
        for template in entry.templates:
            if template.spi:
                for key in self._without_spi.of(template.reqid):
                    self._mark(key, closing=closing)

    def _mark(self, key: SpdKey, *, closing: bool) -> None:
        if closing:
            self._marked.pop(key, None)
            self._closing[key] = None
        elif key not in self._closing:
            self._marked[key] = None

    # --- rules ----------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Tell whether policies are marked."""
        return bool(self._closing or self._marked)

    def of_reqid(self, reqid: int) -> Iterator[SpdEntry]:
        """Yield the policies with a template of a reqid."""
        return (self.policies[key] for key in self._by_reqid.of(reqid))

    def take(
        self, sas: SasOf, negotiated: Negotiated, limit: int
    ) -> Iterator[tuple[Hashable, list[Rule]]]:
        """Yield owners and their new rules: those of marked policies, until `limit` is reached."""
        made = 0
        while made < limit and self.pending:
            key, _ = (self._closing or self._marked).popitem(last=False)
            entry = self.policies.get(key)
            if self._left:
                self._left.discard(key)
            if entry is None or not applies(entry):
                yield key, []
                neighbours: set[SpdKey] = set()
            else:
                rules = rules_of(entry, sas, negotiated)
                yield key, rules
                neighbours = self._meet(entry, rules)
            made += 1 + len(neighbours)
            if neighbours or key in self._pairs:
                yield from self._pair_up(key, neighbours)

    def _meet(self, entry: SpdEntry, rules: Sequence[Rule]) -> set[SpdKey]:
        """Return the other policies whose rules were made and that share flows with this one."""
        key, region = entry.key, rules[-1].match
        there = self._neighbours.get(entry.priority)
        if there is None:
            there = self._neighbours[entry.priority] = _Neighbours()
        if key not in self._whole:
            there.add(key, region)
        self._whole[key] = whole_entry(rules)
        return there.sharing_with(key, region)

    def _pair_up(
        self, key: SpdKey, neighbours: set[SpdKey]
    ) -> Iterator[tuple[Hashable, list[Rule]]]:
        before = self._pairs.get(key, set())
        for other in before - neighbours:
            self._pairs[other].discard(key)
            yield frozenset((key, other)), []
        for other in neighbours:
            self._pairs.setdefault(other, set()).add(key)
            yield (
                frozenset((key, other)),
                shared_rules(
                    self.policies[key],
                    self._whole.get(key),
                    self.policies[other],
                    self._whole.get(other),
                ),
            )
        if neighbours:
            self._pairs[key] = set(neighbours)
        else:
            self._pairs.pop(key, None)


class _Neighbours:
    """Policies of one priority; finds those that share flows."""

    def __init__(self) -> None:
        self._rows: dict[Key, Groups[Key, SpdKey]] = {}  # by mask, by value
        # By mask and a mask in common with another: by the part of the value that both keep.
        self._indexes: dict[Key, dict[Key, Groups[Key, SpdKey]]] = {}

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, key: SpdKey, region: Ternary) -> None:
        if region.mask not in self._rows:
            self._rows[region.mask] = Groups()
        self._rows[region.mask].add(region.value, key)
        for common, index in self._indexes.get(region.mask, {}).items():
            index.add(region.value.masked(common), key)

    def remove(self, key: SpdKey, region: Ternary) -> None:
        row = self._rows[region.mask]
        row.discard(region.value, key)
        for common, index in self._indexes.get(region.mask, {}).items():
            index.discard(region.value.masked(common), key)
        if not row:
            del self._rows[region.mask]
            self._indexes.pop(region.mask, None)

    def sharing_with(self, key: SpdKey, region: Ternary) -> set[SpdKey]:
        """Return the other policies that share a flow with this one."""
        found: set[SpdKey] = set()
        for mask, row in self._rows.items():
            if mask == region.mask:
                found.update(row.of(region.value))
                continue
            common = mask.masked(region.mask)
            found.update(self._index(mask, common).of(region.value.masked(common)))
        found.discard(key)
        return found

    def _index(self, mask: Key, common: Key) -> Groups[Key, SpdKey]:
        indexes = self._indexes.setdefault(mask, {})
        if common not in indexes:
            if len(indexes) > 2 * len(self._rows):
                indexes.clear()  # most are for masks that have gone
            index: Groups[Key, SpdKey] = Groups()
            row = self._rows[mask]
            for value in row.keys():  # noqa: SIM118  not a dictionary
                for key in row.of(value):
                    index.add(value.masked(common), key)
            indexes[common] = index
        return indexes[common]
