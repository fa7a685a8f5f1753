"""Write the hooks' tables, and take over those of a predecessor.

A table changes with no window: entries are written for a generation to come, then one word begins
it (`core.tables.image`).

Rules of this module: work in proportion to the entries is done in parts, and other tasks of the
loop run between them. `on_pause` is called there, too: it may close flows at once (`cut`), even
some that the change being written would open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import replace

from ipsecgate.core.tables import layout, packed
from ipsecgate.core.tables.image import Space, TableImage
from ipsecgate.core.tables.layout import (
    INDEX,
    SETTING,
    Entry,
    Key,
    LayoutError,
    Setting,
    State,
    TableId,
)
from ipsecgate.core.tables.slots import CrowdedError
from ipsecgate.core.tables.table import Table, Ternary
from ipsecgate.edges.bpf import elements
from ipsecgate.edges.bpf.maps import PUBLISHED, Maps, boot_time
from ipsecgate.edges.bpf.parts import ENTRIES_PER_PART, Pause, drop, let_others_run, parts_of
from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.edges.bpf.store import Store, order_writes

LEVELS = {TableId.POLICY: Setting.POLICY_LEVELS, TableId.SPD: Setting.SPD_LEVELS}
REMEMBERED = (Setting.DENY, Setting.PATHS, Setting.MARKS)  # sockets remember decisions by them
# What is being written is for the generation so many further on: those in between are for flows
# that are closed meanwhile.
AHEAD = 1 << 20

Difference = tuple[Ternary, Entry | None]


class Tables(Maps):
    """The hooks' tables and settings. `take_over` comes first."""

    def __init__(self, pins: Pins) -> None:
        """Open every map. Raises: OSError."""
        super().__init__(pins)
        self.on_pause: Callable[[], None] = lambda: None
        self.writing = asyncio.Lock()
        self.images = {table: TableImage(table) for table in TableId}
        self.store = Store(
            self._nests["entries"],
            self._nests["slots"],
            self.setting(Setting.SLOTS),
            lambda value: self.set(Setting.SLOTS, value),
            self._level_of,
        )
        self._is_ours = False  # whether nothing of a predecessor waits for a generation to come
        self._coming = 0  # the generation for which something is being written
        self._cut: set[tuple[TableId, Ternary]] = set()  # meanwhile
        self._gone: set[bytes] = set()  # keys to remove when it has begun

    def close(self) -> None:
        """Close every descriptor; pins and links stay, and the hooks keep refusing."""
        self.store.close()
        super().close()

    def set(self, which: Setting, value: int) -> None:
        """Write one word; it applies to the next call of any hook. Raises: OSError."""
        elements.update(self._fds["settings"], INDEX.pack(which), SETTING.pack(value))
        if which in REMEMBERED and self._is_ours:
            self.raise_generation()  # sockets remember what was right before

    # --- taking over ----------------------------------------------------------------

    async def take_over(self) -> None:
        """Read what a predecessor has left, and take back what it never put in force.

        Removes foreign entries, and a table that is not published, or not any more. Other tasks run
        meanwhile; they may write settings, but no table. Raises: OSError.
        """
        self.images = {table: TableImage(table) for table in TableId}
        published = {table for table in TableId if self.setting(PUBLISHED[table])}
        masks: dict[tuple[int, int], Key | None] = {}
        await self.store.count(let_others_run)
        generation, boot = self.setting(Setting.GENERATION), boot_time()
        for part in self.store.entries():
            for place, raw in part:
                key = packed.key_of_entry(raw)
                table, number, _ = layout.unpack_key(key)
                entry = answer_of(raw, generation, boot)
                if table not in published or entry is None or not _is_found(raw):
                    self.store.forget(place)
                    continue
                if (table, number) not in masks:
                    masks[table, number] = self.mask(TableId(table), number)
                if not self.images[TableId(table)].adopt(key, masks[table, number], entry):
                    self.store.forget(place)
                elif packed.is_pending(raw, generation):
                    again = packed.pack_entry(key, 0, packed.pack_answer(entry, boot))
                    self.store.correct(place, again)
            await let_others_run()
        for table, image in self.images.items():
            self.set(LEVELS[table], image.levels)
        self._is_ours = True
        self.raise_generation()  # a predecessor may have died before this, after a source

    def _level_of(self, table: int, number: int) -> int:
        """Return the level of a mask, 0 for one that somebody else made up."""
        return self.images[TableId(table)].level_of(number) if table in self.images else 0

    # --- changes --------------------------------------------------------------------

    async def publish(self, table: TableId, content: Table) -> None:
        """Replace a table's content, at once. Other tasks run while it is being written.

        Raises: OSError or LayoutError when the maps are full. The old table then stays in force,
        and this must be closed: a successor takes back what was written.
        """
        async with self.writing:
            there, wanted = self.images[table].table, content.copy()
            await self._write(table, lambda: _differences(there, wanted), self._pause)

    async def change(self, table: TableId, changes: Iterable[Difference]) -> None:
        """Change entries of a table, all at once; None removes one.

        Other tasks run meanwhile if there are more than `ENTRIES_PER_PART`. Raises: as `publish`.
        """
        every = list(changes)
        async with self.writing:
            await self._write(table, lambda: parts_of(every), self._pause)

    async def restore(self, table: TableId, changes: Iterable[Difference]) -> None:
        """Do the same for a caller that holds `writing`. `on_pause` is not called."""
        every = list(changes)
        await self._write(table, lambda: parts_of(every), let_others_run)

    async def _write(
        self, table: TableId, differences: Callable[[], Iterator[list[Difference]]], pause: Pause
    ) -> None:
        """Write differences, and put them in force; there is no pause if they are few."""
        image, space, count = self.images[table], Space(), 0
        self._cut = set()
        for number, some in enumerate(differences()):
            new = self._new(table, some)
            image.need(new, space)
            count += len(new)
            if number:
                await pause()
        if not count and self.setting(PUBLISHED[table]):
            return
        slots = space.slots
        await drop(space.prefixes, pause)
        await self.store.make_space(count, slots, pause)
        self._coming = self.setting(Setting.GENERATION) + AHEAD
        for number, some in enumerate(differences()):
            await self._prepare(table, self._new(table, some))
            if number:
                await pause()
        if not self.setting(PUBLISHED[table]):
            self.set(PUBLISHED[table], 1)
        self.raise_generation(self._coming)
        number = 0
        while self._gone:
            self.store.remove(self._gone.pop())
            number += 1
            if number % ENTRIES_PER_PART == 0:
                await pause()

    def _new(self, table: TableId, changes: Iterable[Difference]) -> list[Difference]:
        """Leave out what is there already, and what was cut meanwhile."""
        content = self.images[table].table
        return [
            (match, entry)
            for match, entry in changes
            if content.get(match) != entry and (table, match) not in self._cut
        ]

    async def _prepare(self, table: TableId, changes: Iterable[Difference]) -> None:
        """Write changes for the coming generation. Raises: OSError; LayoutError."""
        writes = self.images[table].change(changes, self._coming - 1, boot_time())
        levels = self.setting(LEVELS[table])
        if writes.levels & ~levels:
            self.set(LEVELS[table], levels | writes.levels)
        for number, mask in writes.masks:
            self.set_mask(table, number, mask)
        for raw in writes.puts:
            try:
                self.store.put(raw)
            except CrowdedError:
                await self.store.fill(let_others_run, self.store.place_bits + 1)
                self.store.put(raw)
        for mark in writes.marks:  # after the puts, which may have filled new slots
            self.store.mark(mark)
        self._gone.update(writes.deletes)

    async def _pause(self) -> None:
        await let_others_run()
        self.on_pause()

    def cut(
        self, table: TableId, changes: Mapping[Ternary, Entry | None]
    ) -> dict[Ternary, Entry | None]:
        """Close flows while a change is being written; return what must wait until it is.

        An entry is overwritten where it is: live or about to be, it is what `changes` says from now
        on. Whatever closes no entry of this kind waits. Raises: OSError.
        """
        generation, boot, wait = self.setting(Setting.GENERATION), boot_time(), {}
        image = self.images[table]
        for match, entry in changes.items():
            key = image.key_if_any(match)
            there = None if key is None else self.store.find(key)
            if key is None or there is None or _is_live(entry):
                wait[match] = entry
                continue
            shown = packed.unpack_entry(there.raw, generation)
            was_live = _is_live(answer_of(there.raw, generation, boot))
            if not was_live and not _is_live(image.table.get(match)):
                wait[match] = entry
                continue
            answer = packed.NOTHING if entry is None else packed.pack_answer(entry, boot)
            since = self._coming if packed.is_pending(there.raw, generation) else 0
            before = answer if was_live else shown
            self.store.correct(there.place, packed.pack_entry(key, since, answer, before))
            image.table.put(match, entry)
            self._cut.add((table, match))
            if entry is None:
                self._gone.add(key)
            else:
                self._gone.discard(key)
        if len(wait) < len(changes):
            self.raise_generation()
        return wait

    async def tagged(self, tags: Container[int]) -> dict[Ternary, Entry]:
        """Return the flows that are open because of the SAs with these tags (`Entry.id`)."""
        found: dict[Ternary, Entry] = {}
        generation, boot = self.setting(Setting.GENERATION), boot_time()
        for part in self.store.with_ids(tags):
            await let_others_run()
            for number in part:
                raw = self.store.raw(number)
                match, entry = self._spd_match(raw), answer_of(raw, generation, boot)
                if match and entry is not None and _is_live(entry) and entry.id in tags:
                    found[match] = entry
        return found

    async def close_tagged(self, tags: Container[int], but: Container[Ternary] = ()) -> None:
        """Close the flows that are open because of the SAs with these tags, `but` for some.

        This is for a table of which only a predecessor knew why its entries are live. It may be
        read meanwhile (`take_over`). Raises: OSError.
        """
        for part in self.store.with_ids(tags):
            await let_others_run()
            for some in parts_of(part):
                for number in some:
                    self._close_tagged(number, tags, but)
                self.raise_generation()
                await let_others_run()

    def _close_tagged(self, number: int, tags: Container[int], but: Container[Ternary]) -> None:
        raw, image = self.store.raw(number), self.images[TableId.SPD]
        key = packed.key_of_entry(raw)
        if layout.unpack_key(key)[0] != TableId.SPD or (but and self._spd_match(raw) in but):
            return
        self.store.correct_entry(number, packed.without_sas(raw, tags))
        match = image.match_of(key)
        entry = None if match is None else image.table.get(match)
        if match is not None and entry is not None and _is_live(entry) and entry.id in tags:
            image.table.put(match, replace(entry, state=State.DEAD))

    def _spd_match(self, raw: bytes) -> Ternary | None:
        """Return which flows an entry of the SPD table matches, None for any other entry."""
        table, number, value = layout.unpack_key(packed.key_of_entry(raw))
        mask = self.mask(TableId.SPD, number) if table == TableId.SPD else None
        return None if mask is None else Ternary(value, mask)

    def withdraw(self, table: TableId) -> None:
        """Make the hooks find nothing in a table, at once; this needs no memory in the kernel.

        The instance must then be closed: the next controller deletes the entries. Raises: OSError.
        """
        elements.update(self._fds["settings"], INDEX.pack(PUBLISHED[table]), SETTING.pack(0))
        self.raise_generation()

    def set_mask(self, table: TableId, number: int, mask: Key) -> None:
        """Write the mask of a number. Raises: OSError."""
        where = INDEX.pack(table * layout.MASKS + number)
        elements.update(self._fds["masks"], where, packed.pack_mask(mask, table, number))

    def raise_generation(self, to: int = 0) -> None:
        """Begin a generation, which ends what sockets and processors remember of the last.

        `to`: which, 0: the next. Raises: OSError.
        """
        generation = to or self.setting(Setting.GENERATION) + 1
        order_writes()
        elements.update(
            self._fds["settings"], INDEX.pack(Setting.GENERATION), SETTING.pack(generation)
        )
        self.store.settle()


def _is_live(entry: Entry | None) -> bool:
    return entry is not None and entry.state is State.LIVE


def _is_found(raw: bytes) -> bool:
    """Return whether a struct gate_entry has its key's hash, by which it is found."""
    return packed.hash_of_entry(raw) == layout.key_hash(packed.key_of_entry(raw))


def answer_of(raw: bytes, generation: int, boot: int) -> Entry | None:
    """Return what a struct gate_entry says in a generation, None if nothing."""
    try:
        return packed.unpack_answer(packed.unpack_entry(raw, generation), boot)
    except LayoutError:
        return None


def _differences(there: Table, wanted: Table) -> Iterator[list[Difference]]:
    """Yield the changes that make one table the other, of so many entries at a time.

    The first one may change meanwhile.
    """
    for mask, row in list(there.rows.items()):
        for some in parts_of(list(row)):
            kept = wanted.rows.get(mask, {})
            yield [(Ternary(value, mask), None) for value in some if value not in kept]
    for entries in parts_of(wanted.entries()):
        yield [one for one in entries if there.get(one[0]) != one[1]]
