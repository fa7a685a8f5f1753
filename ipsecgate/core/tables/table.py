"""From ordered rules to what the hook searches: masks in order, entries by masked key.

Rules of this module:
- First matching rule wins, in the order given; a table never changes an answer.
- A tuple is a mask with a place in the order. The hook tries one after the
  other and stops at the first hit (tuple-space search: Srinivasan, Suri,
  Varghese, "Packet Classification using Tuple Space Search", SIGCOMM 1999).
- Rules share a tuple wherever that cannot change an answer, so the count of
  tuples is about the count of distinct masks.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from ipsecgate.core.model.flow import PORT_MASK, Network, Selector
from ipsecgate.core.tables.layout import ENTRIES, TUPLES, Entry, Key, State, address_bits

LIMIT = ENTRIES // 4  # of a table: there are two, and each is built beside its predecessor
_ALL_ADDRESS = (1 << 128) - 1


class TableFullError(ValueError):
    """More masks or entries than the hook's maps hold; the old table stays."""


@dataclass(frozen=True, slots=True)
class Ternary:
    """A value with a mask: a flow matches where the mask has ones and the value agrees."""

    value: Key
    mask: Key

    def matches(self, key: Key) -> bool:
        """Tell whether a flow's key matches."""
        return key.masked(self.mask) == self.value

    def intersect(self, other: Self) -> Ternary | None:
        """Return what matches both, None where nothing does."""
        common = common_mask(self.mask, other.mask)
        if self.value.masked(common) != other.value.masked(common):
            return None
        return Ternary(_merge(self.value, other.value), _merge(self.mask, other.mask))


def _bits(key: Key) -> tuple[int, ...]:
    return key.saddr, key.daddr, key.sport, key.dport, key.proto, key.family, key.mark


def _merge(a: Key, b: Key) -> Key:
    return Key(*(x | y for x, y in zip(_bits(a), _bits(b), strict=True)))


def network_bits(network: Network) -> tuple[int, int]:
    """Return a network's (value, mask) in the maps' one address form."""
    host_bits = network.max_prefixlen - network.prefixlen
    mask = _ALL_ADDRESS >> host_bits << host_bits
    return address_bits(network.network_address, network.version), mask


def ternary(
    dst: Network,
    *,
    src: Network | None = None,
    proto: int = 0,
    sport: tuple[int, int] = (0, 0),
    dport: tuple[int, int] = (0, 0),
    mark: tuple[int, int] = (0, 0),
) -> Ternary:
    """Build a ternary of one family; ports and mark are (value, mask), `src` None is any."""
    daddr, daddr_mask = network_bits(dst)
    saddr, saddr_mask = network_bits(src) if src is not None else (0, 0)
    return Ternary(
        Key(saddr, daddr, sport[0] & sport[1], dport[0] & dport[1], proto, dst.version, mark[0]),
        Key(saddr_mask, daddr_mask, sport[1], dport[1], 0xFF if proto else 0, 0xFF, mark[1]),
    )


def from_selector(selector: Selector, mark: tuple[int, int] = (0, 0)) -> Ternary:
    """Return an XFRM selector as a ternary; its interface index is not looked at."""
    return ternary(
        selector.dst,
        src=selector.src,
        proto=selector.proto,
        sport=(selector.sport, selector.sport_mask),
        dport=(selector.dport, selector.dport_mask),
        mark=mark,
    )


def port_masks(low: int, high: int) -> list[tuple[int, int]]:
    """Cover the inclusive range with the fewest aligned (value, mask) blocks.

    Raises: ValueError if the range is empty or outside 0..65535.
    """
    if not 0 <= low <= high <= PORT_MASK:
        raise ValueError(f"port range {low}-{high}")
    blocks = []
    while low <= high:
        size = low & -low or PORT_MASK + 1
        while low + size - 1 > high:
            size >>= 1
        blocks.append((low, PORT_MASK & ~(size - 1)))
        low += size
    return blocks


@dataclass(frozen=True, slots=True)
class Rule:
    """Flows that match get this entry, unless an earlier rule has them.

    `owner` is whose it is: where not all rules fit, all that an owner lets go is closed together.
    """

    match: Ternary
    entry: Entry
    owner: Any = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Table:
    """Masks in the order they are tried, and entries by (tuple, masked key)."""

    masks: tuple[Key, ...]
    entries: Mapping[tuple[int, Key], Entry]

    def classify(self, key: Key) -> Entry | None:
        """Answer as the hook does: first hit in tuple order, None without one."""
        for index, mask in enumerate(self.masks):
            entry = self.entries.get((index, key.masked(mask)))
            if entry is not None:
                return entry
        return None

    def changes_from(self, old: Table | None) -> list[tuple[int, Key, Entry]] | None:
        """Return the entries that differ from `old`, with their masks' places.

        None if keys or masks differ, too, so the whole table must be replaced.
        """
        if old is None or self.masks != old.masks or self.entries.keys() != old.entries.keys():
            return None
        return [(*at, entry) for at, entry in self.entries.items() if old.entries[at] != entry]

    def regions_changed_from(self, old: Table | None) -> list[Ternary] | None:
        """Return regions outside which every flow gets the same answer as before; None: unknown.

        If the masks that both tables have are in the same order, a flow that matches no entry which
        came, went or changed meets the same entries in the same order.
        """
        if old is None or any(len(set(one.masks)) < len(one.masks) for one in (old, self)):
            return None
        common = set(old.masks) & set(self.masks)
        order = [[mask for mask in one.masks if mask in common] for one in (old, self)]
        if order[0] != order[1]:
            return None
        before, now = (
            {(one.masks[index], key): entry for (index, key), entry in one.entries.items()}
            for one in (old, self)
        )
        changed = {at for at, _ in before.items() ^ now.items()}
        return [Ternary(key, mask) for mask, key in changed]


EMPTY = Table((), {})


def compile_table(rules: Iterable[Rule]) -> Table:
    """Order rules into tuples. Raises: TableFullError."""
    groups: list[_Group] = []
    for rule in rules:
        if any(group.shadows(rule.match) for group in groups):
            continue
        place = _place(groups, rule.match)
        if place == len(groups):
            groups.append(_Group(rule.match.mask))
        groups[place].add(rule)
    if len(groups) > TUPLES:
        raise TableFullError(f"{len(groups)} distinct masks, but the hooks hold {TUPLES}")
    table = _table(groups)
    if len(table.entries) > LIMIT:
        raise TableFullError(f"{len(table.entries)} entries, but a table holds {LIMIT}")
    return table


def compile_partial(rules: Iterable[Rule]) -> tuple[Table, set[Any]]:
    """Order as many rules into tuples as there is room for; return also whose are closed.

    No live rule is behind one that found no room and has a flow of it. What is closed is dead
    where it already was.
    """
    groups: list[_Group] = []
    closed: set[Any] = set()
    missing = OverlapIndex()
    count = 0
    for rule in rules:
        if any(group.shadows(rule.match) for group in groups):
            continue
        place = _place(groups, rule.match)
        full = count == LIMIT or place == TUPLES
        if rule.entry.state is State.LIVE:
            if full or rule.owner in closed or missing.any(rule.match):
                closed.add(rule.owner)
                continue
        elif full:
            missing.add(rule)
            continue
        if place == len(groups):
            groups.append(_Group(rule.match.mask))
        groups[place].add(rule)
        count += 1
    return _table(groups, closed), closed


def _table(groups: list[_Group], closed: Container[Any] = ()) -> Table:
    entries = {
        (index, value): replace(rule.entry, state=State.DEAD, deadline=0)
        if rule.owner in closed and rule.entry.state is State.LIVE
        else rule.entry
        for index, group in enumerate(groups)
        for value, rule in group.rules.items()
    }
    return Table(tuple(group.mask for group in groups), entries)


class OverlapIndex:
    """Rules that can be asked quickly whether they have a flow in common with another."""

    def __init__(self) -> None:
        self._groups: dict[Key, _Group] = {}

    def add(self, rule: Rule) -> None:
        """Put one in."""
        mask = rule.match.mask
        if mask not in self._groups:
            self._groups[mask] = _Group(mask)
        self._groups[mask].add(rule)

    def masks(self, match: Ternary) -> Iterator[Key]:
        """Yield the masks of those that do."""
        return (mask for mask, group in self._groups.items() if group.overlaps(match))

    def any(self, match: Ternary) -> bool:
        """Tell whether any does."""
        return next(self.masks(match), None) is not None


class _Group:
    """The rules of one tuple, and an index that finds those in the way of another."""

    def __init__(self, mask: Key) -> None:
        self.mask = mask
        self.rules: dict[Key, Rule] = {}
        self._indexes: dict[Key, set[Key]] = {}  # by a narrower mask: the values under it

    def add(self, rule: Rule) -> None:
        self.rules[rule.match.value] = rule
        for mask, values in self._indexes.items():
            values.add(rule.match.value.masked(mask))

    def shadows(self, match: Ternary) -> bool:
        """Tell whether an earlier rule already has every flow of this one."""
        wider = all(m & r == m for m, r in zip(_bits(self.mask), _bits(match.mask), strict=True))
        return wider and match.value.masked(self.mask) in self.rules

    def overlaps(self, match: Ternary) -> bool:
        """Tell whether a rule has a flow in common with this one."""
        common = common_mask(self.mask, match.mask)
        if common not in self._indexes:
            self._indexes[common] = {value.masked(common) for value in self.rules}
        return match.value.masked(common) in self._indexes[common]


def common_mask(a: Key, b: Key) -> Key:
    """Return the bits that both masks look at."""
    return Key(*(x & y for x, y in zip(_bits(a), _bits(b), strict=True)))


def _place(groups: list[_Group], match: Ternary) -> int:
    """Return the last tuple of the rule's mask if no earlier rule behind it overlaps."""
    for place in range(len(groups) - 1, -1, -1):
        if groups[place].mask == match.mask:
            return place
        if groups[place].overlaps(match):
            break
    return len(groups)
