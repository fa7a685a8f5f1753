"""A change of many entries is in force at once, and a writer that dies has changed nothing.

The maps are plain memory here, and a hook is written in Python: it searches them after every
single write. tests/system/test_classifier.py compares the real hooks with the table.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipsecgate.core.tables import image, index, layout, packed
from ipsecgate.core.tables.image import TableImage, Writes
from ipsecgate.core.tables.layout import Entry, Key, LayoutError, State, TableId
from ipsecgate.core.tables.slots import Slots
from ipsecgate.core.tables.table import Table, Ternary
from tests.unit.random_rules import flows, ternaries

FEW = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
ENTRIES = st.builds(
    lambda state, rank: Entry(state, rank=rank), st.sampled_from(list(State)), st.integers(0, 9)
)
CONTENTS = st.lists(st.tuples(ternaries(), ENTRIES), max_size=8)


class Maps:
    """The maps that hold one table, and the words that the hooks read first."""

    def __init__(self) -> None:
        self.generation = 1
        self.levels = 0
        self.masks: dict[int, Key] = {}
        self.entries: list[bytes] = []
        self.slots = Slots(
            memoryview(bytearray(8 << 10)).cast("I"),
            (10, 10),
            lambda number: packed.key_of_entry(self.entries[number]),
        )

    def look_up(self, flow: Key) -> Entry | None:
        """Search as `search` of bpf/search.bpf.c does."""
        best: Entry | None = None
        for level in range(17):
            if not self.levels & index.level_bits(level, flow.family):
                continue
            hash_ = index.prefix_hash(flow.daddr, level, TableId.SPD)
            for slot in self.slots.masks_at(hash_):
                raw = self._try(flow, slot)
                found = raw and packed.unpack_answer(packed.unpack_entry(raw, self.generation))
                if found and (best is None or found.rank < best.rank):
                    best = found
        return best

    def _try(self, flow: Key, slot: int) -> bytes | None:
        number = slot % layout.MASKS
        key = layout.pack_key(flow.masked(self.masks[number]), TableId.SPD, number)
        hash_ = layout.key_hash(key)
        if index.mask_slot(number, hash_) & ~slot:
            return None
        place = self.slots.find(hash_, key)
        return None if place is None else self.entries[place]

    def put(self, raw: bytes) -> None:
        self.entries.append(raw)
        key = packed.key_of_entry(raw)
        self.slots.put(packed.hash_of_entry(raw), key, len(self.entries) - 1)

    def remove(self, key: bytes) -> None:
        self.slots.remove(layout.key_hash(key), key)

    def stored(self) -> list[bytes]:
        return [self.entries[number] for part in self.slots.places() for _, number in part]

    def write(self, writes: Writes, watch: Callable[[], object] = int) -> None:
        """Apply a change write by write, and call `watch` after each."""
        self.begin(writes)
        for raw in writes.puts:
            self.put(raw)
            watch()
        self.generation += 1
        watch()
        for key in writes.deletes:
            self.remove(key)
            watch()

    def begin(self, writes: Writes) -> None:
        """Write what finds the entries of a change."""
        self.levels |= writes.levels
        self.masks |= dict(writes.masks)
        for mark in writes.marks:
            self.slots.mark(mark)


def table_of(content: list[tuple[Ternary, Entry]]) -> Table:
    table = Table()
    for match, entry in content:
        table.put(match, entry)
    return table


def difference(old: Table, new: Table) -> list[tuple[Ternary, Entry | None]]:
    gone = [(match, None) for match, _ in old.entries() if new.get(match) is None]
    return [*gone, *new.entries()]


def rank_of(entry: Entry | None) -> int | None:
    """Return what decides: of two entries of one rank either may be found."""
    return None if entry is None else entry.rank


@FEW
@given(CONTENTS, CONTENTS, st.lists(flows(), min_size=1, max_size=12))
def test_no_flow_is_judged_by_half_of_a_change(
    before: list[tuple[Ternary, Entry]], after: list[tuple[Ternary, Entry]], keys: list[Key]
) -> None:
    old, new = table_of(before), table_of(after)
    maps, made = Maps(), TableImage(TableId.SPD)
    maps.write(made.change(difference(Table(), old), maps.generation, 0))
    first = maps.generation

    def watch() -> None:
        wanted = old if maps.generation == first else new
        for key in keys:
            assert rank_of(maps.look_up(key)) == rank_of(wanted.classify(key))

    writes = made.change(difference(old, new), maps.generation, 0)
    maps.write(writes, watch)
    assert len(writes.puts) == sum(old.get(m) != entry for m, entry in difference(old, new))
    assert len(maps.stored()) == new.size


@FEW
@given(CONTENTS, CONTENTS, st.integers(0, 8), st.lists(flows(), min_size=1, max_size=12))
def test_a_successor_takes_over_what_a_writer_left_that_died(
    before: list[tuple[Ternary, Entry]],
    after: list[tuple[Ternary, Entry]],
    written: int,
    keys: list[Key],
) -> None:
    old, new = table_of(before), table_of(after)
    maps, made = Maps(), TableImage(TableId.SPD)
    maps.write(made.change(difference(Table(), old), maps.generation, 0))
    writes = made.change(difference(old, new), maps.generation, 0)
    maps.begin(writes)
    for raw in writes.puts[:written]:
        maps.put(raw)
    found = {}
    for raw in maps.stored():
        entry = packed.unpack_answer(packed.unpack_entry(raw, maps.generation))
        if entry is None:
            maps.remove(packed.key_of_entry(raw))
        else:
            found[packed.key_of_entry(raw)] = entry
    read = TableImage(TableId.SPD)
    for key, entry in found.items():
        assert read.adopt(key, maps.masks.get(layout.unpack_key(key)[1]), entry)
    assert read.table == old
    assert all(rank_of(maps.look_up(key)) == rank_of(old.classify(key)) for key in keys)


def test_an_entry_of_no_mask_or_with_other_bits_than_its_mask_is_strange() -> None:
    mask = Key(family=0xFF, daddr=0xF0)
    good = layout.pack_key(Key(family=4, daddr=0x10), TableId.SPD, 1)
    bad = [
        layout.pack_key(Key(family=4, daddr=0x11), TableId.SPD, 1),
        layout.pack_key(Key(family=4, daddr=0x10), TableId.SPD, 2),
    ]
    entry = Entry(State.LIVE)
    read = TableImage(TableId.SPD)
    for key in (good, *bad):
        belongs = read.adopt(key, mask if layout.unpack_key(key)[1] == 1 else None, entry)
        assert belongs == (key == good)
    assert not read.adopt(good, mask, entry), "it is there already"
    assert dict(read.table.entries()) == {Ternary(Key(family=4, daddr=0x10), mask): entry}


def test_masks_are_numbered_again_when_they_have_no_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "MASKS", 2)
    made = TableImage(TableId.SPD)
    masks = [Key(family=0xFF, daddr=(1 << 128) - (1 << n)) for n in range(4)]
    matches = [Ternary(Key(family=6), mask) for mask in masks]
    for match, last in zip(matches[1:], matches, strict=False):
        made.change([(match, Entry(State.LIVE, rank=1)), (last, None)], 1, 0)
    assert len(made.masks()) == 2
    before = made.masks()
    with pytest.raises(LayoutError, match="4 masks, a table holds 2"):
        made.change([(match, Entry(State.LIVE, rank=1)) for match in matches[:3]], 1, 0)
    assert made.masks() == before, "a change that is refused changes nothing"


def test_a_mask_is_written_once() -> None:
    made = TableImage(TableId.SPD)
    mask = Key(family=0xFF, daddr=0xFFFF)
    matches = [Ternary(Key(family=4, daddr=n), mask) for n in range(2)]
    assert made.change([(matches[0], Entry(State.LIVE))], 1, 0).masks == [(0, mask)]
    assert made.change([(matches[1], Entry(State.LIVE))], 1, 0).masks == []


def test_a_change_that_changes_nothing_writes_nothing() -> None:
    made = TableImage(TableId.SPD)
    match = Ternary(Key(family=4), Key(family=0xFF))
    made.change([(match, Entry(State.LIVE))], 1, 0)
    writes = made.change([(match, Entry(State.LIVE))], 2, 0)
    assert writes == Writes()
