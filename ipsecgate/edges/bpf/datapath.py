"""Write the hooks' tables and receive their refusals.

A table changes with no window: entries are written for the next generation, then one word begins
it (`core.tables.image`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import TypeVar

from ipsecgate.core.model.events import FlowRefused
from ipsecgate.core.model.flow import FlowPath, Network, Origin
from ipsecgate.core.tables import layout, packed
from ipsecgate.core.tables.image import Space, TableImage
from ipsecgate.core.tables.layout import INDEX, SETTING, Entry, Key, LayoutError, Setting, TableId
from ipsecgate.core.tables.table import Table, Ternary
from ipsecgate.edges.bpf import elements
from ipsecgate.edges.bpf.maps import PUBLISHED, Maps, boot_time
from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.edges.bpf.ring import Ring
from ipsecgate.edges.bpf.store import Store, Stored, order_writes

LEVELS = {TableId.POLICY: Setting.POLICY_LEVELS, TableId.SPD: Setting.SPD_LEVELS}
ENTRIES_PER_TURN = 256  # written before other tasks of the loop get a turn: two milliseconds

Difference = tuple[Ternary, Entry | None]
T = TypeVar("T")


class Datapath(Maps):
    """The maps of one loaded instance, kept open by its only controller."""

    def __init__(self, pins: Pins) -> None:
        """Open every map, and clear what a predecessor left half-written. Raises: OSError."""
        super().__init__(pins)
        self._paths = self._read_paths()  # as written; a predecessor's are written again
        self._ring: Ring | None = None
        self._images = {table: TableImage(table) for table in TableId}
        self._store = Store(
            self._nests["entries"],
            self._nests["slots"],
            self.setting(Setting.SLOTS),
            lambda value: self.set(Setting.SLOTS, value),
            self._level_of,
        )
        stored = list(chain.from_iterable(self._store.entries()))
        for table in TableId:
            self._adopt(table, stored)
            self.set(LEVELS[table], self._images[table].levels())
        self._publishing = False
        self._raise_generation()  # a predecessor may have died before this, after a source

    def close(self) -> None:
        """Close every descriptor; pins and links stay, and the hooks keep refusing."""
        if self._ring is not None:
            self._ring.close()
        self._store.close()
        super().close()

    # --- settings -----------------------------------------------------------------

    def set(self, which: Setting, value: int) -> None:
        """Write one word; it applies to the next call of any hook. Raises: OSError."""
        elements.update(self._fds["settings"], INDEX.pack(which), SETTING.pack(value))
        if which in (Setting.DENY, Setting.PATHS, Setting.MARKS):
            self._raise_generation()  # sockets remember what was right before

    # --- tables -------------------------------------------------------------------

    def _adopt(self, table: TableId, stored: Iterable[Stored]) -> None:
        """Adopt a table from all that is stored, and take back what was never put in force.

        Removes foreign entries, and a table that is not published, or not any more.
        """
        stored = [one for one in stored if _is_of(table, one)]
        listed = stored if self.setting(PUBLISHED[table]) else []
        masks = self._masks(table, (one.raw for one in listed))
        generation, boot = self.setting(Setting.GENERATION), boot_time()
        entries: dict[bytes, Entry] = {}
        places: dict[bytes, Stored] = {}
        strange: list[Stored] = []
        for one in stored:
            entry, key = self._answer(one.raw, generation, boot), packed.key_of_entry(one.raw)
            if entry is None or key in entries:
                strange.append(one)
                continue
            if packed.is_pending(one.raw, generation):
                again = packed.pack_entry(key, 0, packed.pack_answer(entry, boot))
                self._store.correct(one.place, again)
            entries[key], places[key] = entry, one
        self._images[table], unlisted = TableImage.read(table, masks, entries)
        for one in (*strange, *(places[key] for key in unlisted)):
            self._store.forget(one.place)

    def _undo(self, table: TableId) -> None:
        """Take back a change that is not in force; the next generation would put it in force."""
        self._adopt(table, chain.from_iterable(self._store.entries()))

    def _level_of(self, table: int, number: int) -> int:
        """Return the level of a mask, 0 for one that somebody else made up."""
        return self._images[TableId(table)].level_of(number) if table in self._images else 0

    def _answer(self, raw: bytes, generation: int, boot: int) -> Entry | None:
        """Return what an entry says in a generation, None if nothing, or if no one can find it."""
        if packed.hash_of_entry(raw) != layout.key_hash(packed.key_of_entry(raw)):
            return None
        try:
            return packed.unpack_answer(packed.unpack_entry(raw, generation), boot)
        except LayoutError:
            return None

    async def publish(self, table: TableId, content: Table) -> None:
        """Replace a table's content, at once. Other tasks run while it is being written.

        The caller must see to it that nothing else is written meanwhile.
        Raises: OSError or LayoutError when the maps are full (the old table stays in force).
        """
        image, space, count = self._images[table], Space(), 0
        gone: list[bytes] = []
        self._publishing = True
        try:
            for some in _differences(image.table, content):
                image.need(some, space)
                count += len(some)
                await asyncio.sleep(0)
            self._store.make_space(count, space.slots)
            for some in _differences(image.table, content):
                gone += self._prepare(table, some)
                await asyncio.sleep(0)
            self._begin(table)
        except (OSError, LayoutError):
            self._undo(table)
            raise
        finally:
            self._publishing = False
        for number, key in enumerate(gone, 1):
            self._store.remove(key)
            if number % ENTRIES_PER_TURN == 0:
                await asyncio.sleep(0)

    def withdraw(self, table: TableId) -> None:
        """Make the hooks find nothing in a table, at once; this needs no memory in the kernel.

        The instance must then be closed: the next controller deletes the entries. Raises: OSError.
        """
        elements.update(self._fds["settings"], INDEX.pack(PUBLISHED[table]), SETTING.pack(0))
        self._raise_generation()

    def change(self, table: TableId, changes: Iterable[Difference]) -> None:
        """Change entries of a table, all at once; None removes one.

        Raises: OSError or LayoutError when the maps are full (nothing has changed then).
        """
        image = self._images[table]
        changes = [(match, entry) for match, entry in changes if image.table.get(match) != entry]
        if not changes and self.setting(PUBLISHED[table]):
            return
        self._store.make_space(len(changes), image.need(changes, Space()).slots)
        try:
            gone = self._prepare(table, changes)
            self._begin(table)
        except OSError:
            self._undo(table)
            raise
        for key in gone:
            self._store.remove(key)

    def _prepare(self, table: TableId, changes: Iterable[Difference]) -> list[bytes]:
        """Write changes for the next generation; return the keys to delete once it has begun.

        Raises: OSError; LayoutError, and then nothing is written.
        """
        generation = self.setting(Setting.GENERATION)
        writes = self._images[table].change(changes, generation, boot_time())
        self._add_levels(table, writes.levels)
        for number, mask in writes.masks:
            self._set_mask(table, number, mask)
        for raw in writes.puts:
            self._store.put(raw)  # this may fill new slots, so mark after it
        for mark in writes.marks:
            self._store.mark(mark)
        return writes.deletes

    def _begin(self, table: TableId) -> None:
        """Put in force what is written for the next generation. Raises: OSError."""
        if not self.setting(PUBLISHED[table]):
            self.set(PUBLISHED[table], 1)
        self._raise_generation()

    def _set_mask(self, table: TableId, number: int, mask: Key) -> None:
        where = INDEX.pack(table * layout.MASKS + number)
        elements.update(self._fds["masks"], where, packed.pack_mask(mask, table, number))

    def _add_levels(self, table: TableId, levels: int) -> None:
        now = self.setting(LEVELS[table])
        if levels & ~now:
            self.set(LEVELS[table], now | levels)

    async def repair(self, table: TableId, content: Table) -> int:
        """Restore a published table to this content; return how much of it was not right.

        Other tasks run meanwhile. It stops early if one of them changes a table.
        Raises: OSError.
        """
        found, image = _Found(), self._images[table]
        generation, masks = self.setting(Setting.GENERATION), image.masks()
        for some in self._slices(table):
            self._compare(some, content, masks, found)
            await asyncio.sleep(0)
            if self._is_outdated(generation):
                return 0
        if len(found.right) < content.size:
            for entries in _slices(content.entries()):
                found.wrong.update(one for one in entries if one[0] not in found.right)
                await asyncio.sleep(0)
                if self._is_outdated(generation):
                    return 0
        lost = [
            (number, mask) for number, mask in masks.items() if self._mask(table, number) != mask
        ]
        levels = self.setting(LEVELS[table]) & image.levels() == image.levels()
        if not (found.wrong or found.strange or lost) and found.marked and levels:
            return 0
        self._store.recount()  # somebody else may have written entries
        for one in found.strange:
            self._store.forget(one.place)
        for match in found.wrong:
            image.forget(match)
        for number, mask in lost:
            self._set_mask(table, number, mask)
        self.set(LEVELS[table], image.levels())
        self.change(table, found.wrong.items())
        self._store.fill()
        strange = found.strange_keys - {
            image.key(match) for match, entry in found.wrong.items() if entry is not None
        }
        marks = (not found.marked) + (not levels)
        return len(lost) + len(found.wrong) + len(strange) + marks

    def _is_outdated(self, generation: int) -> bool:
        return self._publishing or self.setting(Setting.GENERATION) != generation

    def _slices(self, table: TableId) -> Iterator[list[Stored]]:
        for some in self._store.entries():
            yield from _slices(one for one in some if _is_of(table, one))

    def _compare(
        self, stored: Iterable[Stored], content: Table, masks: Mapping[int, Key], found: _Found
    ) -> None:
        """Compare entries with what they should be."""
        generation, boot = self.setting(Setting.GENERATION), boot_time()
        for one in stored:
            _, number, flows = layout.unpack_key(packed.key_of_entry(one.raw))
            mask = masks.get(number)
            match = None if mask is None else Ternary(flows, mask)
            wanted = None if match is None else content.get(match)
            if match is None or wanted is None or match in found.right:
                found.strange.append(one)
            elif not packed.is_sound(one.raw, generation) or (
                self._answer(one.raw, generation, boot) != wanted
            ):
                found.strange.append(one)
                found.wrong[match] = wanted
            else:
                found.right.add(match)
                found.marked &= self._store.is_marked(one.raw)

    def _raise_generation(self) -> None:
        """Begin a generation, which ends what sockets and processors remember of the last."""
        generation = self.setting(Setting.GENERATION) + 1
        order_writes()
        elements.update(
            self._fds["settings"], INDEX.pack(Setting.GENERATION), SETTING.pack(generation)
        )
        self._store.settle()

    # --- paths --------------------------------------------------------------------

    @property
    def origins(self) -> list[Origin]:
        """Return the origins whose paths the hooks know, perhaps from a predecessor."""
        return list(self._paths)

    def set_paths(self, origin: Origin, paths: Iterable[tuple[Network, FlowPath]]) -> None:
        """Write where routing leads the flows of an origin, by destination; none: forget it.

        Only differences are written. Raises: OSError.
        """
        fd, before = self._fds["paths"], self._paths.get(origin, {})
        # Longest prefix first: otherwise a lookup could match a wider network while the narrower
        # one that is right is not written yet.
        ordered = sorted(paths, key=lambda pair: -pair[0].prefixlen)
        wanted = {packed.pack_route(origin, net): packed.pack_path(path) for net, path in ordered}
        others = sum(map(len, self._paths.values())) - len(before)
        if others + len(before.keys() | wanted.keys()) > layout.ROUTES:
            self._delete_paths(before)  # make space; meanwhile these flows are refused
            before = {}
        for key, value in wanted.items():
            if before.get(key) != value:
                elements.update(fd, key, value)
        self._delete_paths(before.keys() - wanted.keys())
        self._paths[origin] = wanted
        if not wanted:
            del self._paths[origin]
        self._raise_generation()

    def set_tunnels(self, indexes: Iterable[int]) -> None:
        """Write the devices that the backstop lets packets into. Raises: OSError."""
        fd, wanted = self._fds["tunnels"], set(map(INDEX.pack, indexes))
        for key in [key for key in elements.keys(fd, INDEX.size) if key not in wanted]:
            elements.delete(fd, key)
        for key in wanted:
            elements.update(fd, key, b"\1")

    def _delete_paths(self, routes: Iterable[bytes]) -> None:
        """Delete paths, shortest prefix first, so that none matches for a deleted longer one."""
        for key in sorted(routes, key=INDEX.unpack_from):
            elements.delete(self._fds["paths"], key)

    def _read_paths(self) -> dict[Origin, dict[bytes, bytes]]:
        """Return the routes in the map, by origin, with empty values: each is written again."""
        found: dict[Origin, dict[bytes, bytes]] = {}
        for key in elements.keys(self._fds["paths"], packed.ROUTE_SIZE):
            found.setdefault(packed.origin_of_route(key), {})[key] = b""
        return found

    # --- refusals -------------------------------------------------------------------

    def open_ring(self, on_refusal: Callable[[FlowRefused], None]) -> int:
        """Start to read refusals; return a descriptor to poll.

        Call `drain` when it is readable. Two readers would each miss the other's records, so an
        instance has one controller. Raises: OSError.
        """

        def on_record(record: bytes) -> None:
            on_refusal(packed.unpack_event(record))

        self._ring = Ring(self._fds["events"], on_record)
        return self._ring.fd

    def drain(self) -> None:
        """Pass waiting refusals, a bounded number of them, to the callback of `open_ring`.

        Raises: OSError; LayoutError for a record that no hook can have written.
        """
        if self._ring is not None:
            self._ring.consume()


def _is_of(table: TableId, one: Stored) -> bool:
    return layout.unpack_key(packed.key_of_entry(one.raw))[0] == table


@dataclass
class _Found:
    """What a comparison of a table has found."""

    right: set[Ternary] = field(default_factory=set)
    wrong: dict[Ternary, Entry | None] = field(default_factory=dict)  # or missing, as it should be
    strange: list[Stored] = field(default_factory=list)  # to be removed
    marked: bool = True  # whether the index knows those that are right

    @property
    def strange_keys(self) -> set[bytes]:
        return {packed.key_of_entry(one.raw) for one in self.strange}


def _slices(items: Iterable[T]) -> Iterator[list[T]]:
    """Yield items as lists of `ENTRIES_PER_TURN`."""
    iterator = iter(items)
    while some := list(islice(iterator, ENTRIES_PER_TURN)):
        yield some


def _differences(there: Table, wanted: Table) -> Iterator[list[Difference]]:
    """Yield the changes that make one table the other, of so many entries at a time.

    The first one may change meanwhile.
    """
    for mask, row in list(there.rows.items()):
        kept = wanted.rows.get(mask, {})
        for some in _slices(list(row)):
            yield [(Ternary(value, mask), None) for value in some if value not in kept]
    for entries in _slices(wanted.entries()):
        yield [one for one in entries if there.get(one[0]) != one[1]]
