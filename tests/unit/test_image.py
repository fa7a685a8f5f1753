"""A change of many entries is in force at once, and a writer that dies has changed nothing.

The maps are dictionaries here, and a hook is written in Python: it searches them after every single
write. tests/system/test_classifier.py compares the real hooks with the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ipsecgate.core.tables import image, layout
from ipsecgate.core.tables.image import TableImage, Writes
from ipsecgate.core.tables.layout import Entry, Key, LayoutError, State, TableId
from ipsecgate.core.tables.table import Table, Ternary
from tests.unit.random_rules import flows, ternaries

FEW = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
ENTRIES = st.builds(
    lambda state, rank: Entry(state, rank=rank), st.sampled_from(list(State)), st.integers(0, 9)
)
CONTENTS = st.lists(st.tuples(ternaries(), ENTRIES), max_size=8)


@dataclass
class Maps:
    """The maps that hold one table, and the words that the hooks read first."""

    entries: dict[bytes, bytes] = field(default_factory=dict)
    masks: list[bytes] = field(default_factory=lambda: layout.pack_masks([], TableId.SPD))
    generation: int = 1

    def look_up(self, flow: Key) -> Entry | None:
        """Search as `search_part` of bpf/maps.bpf.c does."""
        best: Entry | None = None
        listed = layout.unpack_masks(self.masks)
        for number, (mask, lowest) in sorted(listed.items(), key=lambda item: item[1][1]):
            if best is not None and lowest > best.rank:
                break
            raw = self.entries.get(layout.pack_key(flow.masked(mask), TableId.SPD, number))
            if raw is None:
                continue
            found = layout.unpack_answer(layout.unpack_entry(raw, self.generation))
            if found is not None and (best is None or found.rank < best.rank):
                best = found
        return best

    def write(self, made: TableImage, writes: Writes, watch: Callable[[], object] = int) -> None:
        """Apply a change write by write, and call `watch` after each."""
        for key, value in writes.puts:
            self.entries[key] = value
            watch()
        if writes.masks:
            self.masks = made.masks()
        watch()
        self.generation += 1
        watch()
        for key in writes.deletes:
            del self.entries[key]
            watch()


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
    maps.write(made, made.change(difference(Table(), old), maps.generation, 0))
    first = maps.generation

    def watch() -> None:
        wanted = old if maps.generation == first else new
        for key in keys:
            assert rank_of(maps.look_up(key)) == rank_of(wanted.classify(key))

    writes = made.change(difference(old, new), maps.generation, 0)
    maps.write(made, writes, watch)
    assert len(writes.puts) == sum(old.get(m) != entry for m, entry in difference(old, new))
    assert len(maps.entries) == new.size


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
    maps.write(made, made.change(difference(Table(), old), maps.generation, 0))
    for key, value in made.change(difference(old, new), maps.generation, 0).puts[:written]:
        maps.entries[key] = value
    found = {}
    for key, raw in list(maps.entries.items()):
        entry = layout.unpack_answer(layout.unpack_entry(raw, maps.generation))
        if entry is None:
            del maps.entries[key]
        else:
            found[key] = entry
    read, strange = TableImage.read(TableId.SPD, layout.unpack_masks(maps.masks), found)
    # A mask of the change is not listed yet, so its entries are strange, and none was in force.
    for key in strange:
        del maps.entries[key]
    assert read.table == old
    assert all(rank_of(maps.look_up(key)) == rank_of(old.classify(key)) for key in keys)


def test_an_undone_change_leaves_every_entry_as_it_was() -> None:
    match = Ternary(Key(family=4), Key(family=0xFF))
    other = Ternary(Key(family=6), Key(family=0xFF))
    made = TableImage(TableId.SPD)
    maps = Maps()
    maps.write(made, made.change([(match, Entry(State.LIVE, rank=3))], maps.generation, 0))
    before = layout.unpack_entry(maps.entries[made.key(match)], maps.generation)
    writes = made.change(
        [(match, Entry(State.DEAD, rank=3)), (other, Entry(State.LIVE, rank=4))], maps.generation, 0
    )
    maps.entries.update(writes.puts)
    for key, value in writes.undo:
        if value is None:
            del maps.entries[key]
        else:
            maps.entries[key] = value
    maps.generation += 1
    assert list(maps.entries) == [made.key(match)]
    assert layout.unpack_entry(maps.entries[made.key(match)], maps.generation) == before


def test_masks_are_numbered_again_when_they_have_no_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "MASKS", 2)
    made = TableImage(TableId.SPD)
    masks = [Key(family=0xFF, daddr=(1 << 128) - (1 << n)) for n in range(4)]
    matches = [Ternary(Key(family=6), mask) for mask in masks]
    for match, last in zip(matches[1:], matches, strict=False):
        made.change([(match, Entry(State.LIVE, rank=1)), (last, None)], 1, 0)
    assert len(made.listed()) == 2
    with pytest.raises(LayoutError, match="4 masks, a table holds 2"):
        made.change([(match, Entry(State.LIVE, rank=1)) for match in matches], 1, 0)


def test_a_mask_that_comes_back_when_numbers_run_out_is_numbered_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(image, "MASKS", 3)
    made = TableImage(TableId.SPD)
    live = Entry(State.LIVE, rank=1)
    a, b, c, d = (Ternary(Key(family=4, daddr=n), Key(family=0xFF, daddr=n)) for n in (1, 2, 4, 8))
    made.change([(match, live) for match in (a, b, c)], 1, 0)
    made.change([(a, None), (b, None)], 1, 0)
    assert made.change([(a, live), (d, live)], 1, 0).masks
    assert {mask for mask, _ in made.listed().values()} == {a.mask, c.mask, d.mask}
    assert len({made.key(match) for match in (a, c, d)}) == 3


def test_the_list_of_masks_is_written_only_when_a_better_rank_needs_it() -> None:
    made = TableImage(TableId.SPD)
    mask = Key(family=0xFF, daddr=0xFFFF)
    matches = [Ternary(Key(family=4, daddr=n), mask) for n in range(3)]
    assert made.change([(matches[0], Entry(State.LIVE, rank=5))], 1, 0).masks
    assert not made.change([(matches[1], Entry(State.LIVE, rank=5))], 1, 0).masks
    assert made.change([(matches[2], Entry(State.LIVE, rank=4))], 1, 0).masks
    worse = replace(Entry(State.LIVE), rank=9)
    assert not made.change([(matches[2], worse)], 1, 0).masks


def test_a_change_that_changes_nothing_writes_nothing() -> None:
    made = TableImage(TableId.SPD)
    match = Ternary(Key(family=4), Key(family=0xFF))
    made.change([(match, Entry(State.LIVE))], 1, 0)
    writes = made.change([(match, Entry(State.LIVE))], 2, 0)
    assert (writes.puts, writes.deletes, writes.masks) == ([], [], False)
