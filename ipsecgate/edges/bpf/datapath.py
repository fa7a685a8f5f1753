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
from ipsecgate.core.model.flow import Address, Network
from ipsecgate.core.tables import layout
from ipsecgate.core.tables.image import TableImage, Writes
from ipsecgate.core.tables.layout import INDEX, SETTING, Entry, Key, LayoutError, Setting, TableId
from ipsecgate.core.tables.table import Table, Ternary
from ipsecgate.edges.bpf import libbpf
from ipsecgate.edges.bpf.filter import Filter
from ipsecgate.edges.bpf.maps import LIST, Maps, boot_time
from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.edges.bpf.ring import Ring

ENTRIES_PER_TURN = 256  # written before other tasks of the loop get a turn: two milliseconds

Difference = tuple[Ternary, Entry | None]
T = TypeVar("T")


class Datapath(Maps):
    """The maps of one loaded instance, kept open by its only controller."""

    def __init__(self, pins: Pins) -> None:
        """Open every map, and clear what a predecessor left half-written. Raises: OSError."""
        super().__init__(pins)
        self._sources: dict[bytes, bytes] = {}
        self._ring: Ring | None = None
        self._filter = Filter(
            self._fds["filter"],
            self.setting(Setting.FILTER),
            lambda value: self.set(Setting.FILTER, value),
        )
        self._images: dict[TableId, TableImage] = {}
        self._publishing = False
        for table in TableId:
            self._adopt(table)
        self._refill()
        self._raise_generation()  # a predecessor may have died before this, after a source

    def close(self) -> None:
        """Close every descriptor; pins and links stay, and the hooks keep refusing."""
        if self._ring is not None:
            self._ring.close()
        self._filter.close()
        super().close()

    # --- settings -----------------------------------------------------------------

    def set(self, which: Setting, value: int) -> None:
        """Write one word; it applies to the next call of any hook. Raises: OSError."""
        libbpf.update(self._fds["settings"], INDEX.pack(which), SETTING.pack(value))
        if which is Setting.DENY:
            self._raise_generation()  # sockets remember what the default allowed

    # --- tables -------------------------------------------------------------------

    def _adopt(self, table: TableId) -> None:
        """Adopt the table that a predecessor published, and take back what it left half-written."""
        raw = chain.from_iterable(self._raw_entries(table))
        self._images[table], _ = self._clean_image(table, raw, self._masks(table))

    def _clean_image(
        self,
        table: TableId,
        raw: Iterable[tuple[bytes, bytes]],
        masks: Mapping[int, tuple[Key, int]],
    ) -> tuple[TableImage, frozenset[bytes]]:
        """Return a table as it is in the maps, and the keys of foreign entries, which it deletes.

        It takes back a change that was never put in force.
        """
        generation, boot, fd = self.setting(Setting.GENERATION), boot_time(), self._fds["entries"]
        entries: dict[bytes, Entry] = {}
        strange: list[bytes] = []
        for key, value in raw:
            entry = self._answer(value, generation, boot)
            if entry is None:
                strange.append(key)
                continue
            if layout.is_pending(value, generation):
                again = layout.pack_entry(key, 0, layout.pack_answer(entry, boot))
                libbpf.update(fd, key, again)
            entries[key] = entry
        image, unlisted = TableImage.read(table, masks, entries)
        for key in (*strange, *unlisted):
            libbpf.delete(fd, key)
        return image, frozenset((*strange, *unlisted))

    def _answer(self, value: bytes, generation: int, boot: int) -> Entry | None:
        try:
            return layout.unpack_answer(layout.unpack_entry(value, generation), boot)
        except LayoutError:
            return None

    async def publish(self, table: TableId, content: Table) -> None:
        """Replace a table's content, at once. Other tasks run while it is being written.

        The caller must see to it that nothing else is written meanwhile.
        Raises: OSError or LayoutError when the maps are full (the old table stays in force).
        """
        if self._filter.is_full(content.size):
            self._refill(content.size)  # first, because it begins a generation
        written = Writes()
        self._publishing = True
        try:
            for some in _differences(self._images[table].table, content):
                self._prepare(table, some, written)
                await asyncio.sleep(0)
            self._begin(table, written)
        except (OSError, LayoutError):
            self._undo(table, written)
            raise
        finally:
            self._publishing = False
        for count, raw in enumerate(written.deletes, 1):
            libbpf.delete(self._fds["entries"], raw)
            if count % ENTRIES_PER_TURN == 0:
                await asyncio.sleep(0)

    def withdraw(self, table: TableId) -> None:
        """Make the hooks find nothing in a table, at once; this needs no memory in the kernel.

        The instance must then be closed: the next controller deletes the entries. Raises: OSError.
        """
        libbpf.update(self._fds["settings"], INDEX.pack(LIST[table]), SETTING.pack(0))
        self._raise_generation()

    def change(self, table: TableId, changes: Iterable[tuple[Ternary, Entry | None]]) -> None:
        """Change entries of a table, all at once; None removes one.

        Raises: OSError or LayoutError when the maps are full (nothing has changed then).
        """
        changes = list(changes)
        if self._filter.is_full(len(changes)):
            self._refill()  # first, because it begins a generation
        written = Writes()
        try:
            self._prepare(table, changes, written)
            if written.puts or not self.setting(LIST[table]):
                self._begin(table, written)
        except OSError:
            self._undo(table, written)
            raise
        for raw in written.deletes:
            libbpf.delete(self._fds["entries"], raw)

    def _prepare(self, table: TableId, changes: Iterable[Difference], written: Writes) -> None:
        """Write changes for the next generation, and add them to what is `written` for it.

        Raises: OSError; LayoutError, and then nothing is written.
        """
        image = self._images[table]
        writes = image.change(changes, self.setting(Setting.GENERATION), boot_time())
        written.add(writes)
        self._filter.add(writes.hashes)
        libbpf.update_all(self._fds["entries"], writes.puts)

    def _begin(self, table: TableId, written: Writes) -> None:
        """Put in force what is written for the next generation. Raises: OSError."""
        if written.masks or not self.setting(LIST[table]):
            self._list_masks(table)
        self._raise_generation()

    def _list_masks(self, table: TableId) -> None:
        """Write a list of masks beside the one in use, and use it."""
        number = self.setting(LIST[table]) + 1
        first = (table * 2 + number % 2) * layout.PARTS
        for at, part in enumerate(self._images[table].masks()):
            libbpf.update(self._fds["masks"], INDEX.pack(first + at), part)
        libbpf.update(self._fds["settings"], INDEX.pack(LIST[table]), SETTING.pack(number))

    def _undo(self, table: TableId, writes: Writes) -> None:
        """Take back a change that is not in force; the next generation would put it in force."""
        entries = self._fds["entries"]
        for raw, value in writes.undo:
            if value is None:
                libbpf.delete(entries, raw)  # first, because it frees memory for the others
        for raw, value in writes.undo:
            if value is not None:
                libbpf.update(entries, raw, value)
        self._adopt(table)

    def _refill(self, more: int = 0) -> None:
        """Fill the other filter, with space for `more` entries, use it, and begin a generation."""
        images = self._images.values()
        count = sum(image.table.size for image in images) + more
        self._filter.fill(chain.from_iterable(image.hashes() for image in images), count)
        self._raise_generation()

    async def repair(self, table: TableId, content: Table) -> int:
        """Restore a published table to this content; return how much of it was not right.

        Other tasks run meanwhile. It stops early if one of them changes a table.
        Raises: OSError.
        """
        found = _Found()
        generation, image = self.setting(Setting.GENERATION), self._images[table]
        masks = {number: mask for number, (mask, _) in image.listed().items()}
        for some in self._slices(table):
            self._compare(some, content, masks, found)
            await asyncio.sleep(0)
            if self._publishing or self.setting(Setting.GENERATION) != generation:
                return 0
        if found.right < content.size:
            for entries in _slices(content.entries()):
                found.wrong.update(one for one in entries if self._is_missing(table, one[0]))
                await asyncio.sleep(0)
                if self._publishing or self.setting(Setting.GENERATION) != generation:
                    return 0
        listed = self._masks(table) == image.listed()
        filtered = found.filtered and self.setting(Setting.FILTER) == self._filter.setting
        for key in found.strange:
            libbpf.delete(self._fds["entries"], key)
        for match in found.wrong:
            image.forget(match)
        if not listed:
            self._list_masks(table)
        self.change(table, found.wrong.items())
        if found.wrong or found.strange or not (listed and filtered):
            self._refill()
        return len(found.wrong) + len(found.strange) + (not listed) + (not filtered)

    def _slices(self, table: TableId) -> Iterator[list[tuple[bytes, bytes]]]:
        return chain.from_iterable(_slices(iter(chunk)) for chunk in self._raw_entries(table))

    def _compare(
        self,
        entries: Iterable[tuple[bytes, bytes]],
        content: Table,
        masks: Mapping[int, Key],
        found: _Found,
    ) -> None:
        """Compare entries with what they should be."""
        generation, boot = self.setting(Setting.GENERATION), boot_time()
        for key, value in entries:
            _, number, flows = layout.unpack_key(key)
            mask = masks.get(number)
            wanted = None if mask is None else content.rows.get(mask, {}).get(flows)
            if mask is None or wanted is None:
                found.strange.append(key)
            elif not layout.is_sound(key, value, generation) or (
                self._answer(value, generation, boot) != wanted
            ):
                found.wrong[Ternary(flows, mask)] = wanted
            else:
                found.right += 1
                found.filtered &= not self._filter.lacks((layout.key_hash(key),))

    def _is_missing(self, table: TableId, match: Ternary) -> bool:
        image = self._images[table]
        if image.table.get(match) is None:
            return True
        return libbpf.lookup(self._fds["entries"], image.key(match), layout.ENTRY_SIZE) is None

    def _raise_generation(self) -> None:
        """Begin a generation, which ends what sockets and processors remember of the last."""
        generation = self.setting(Setting.GENERATION) + 1
        libbpf.update(
            self._fds["settings"], INDEX.pack(Setting.GENERATION), SETTING.pack(generation)
        )

    # --- sources ------------------------------------------------------------------

    def set_sources(self, sources: Iterable[tuple[Network, Address | None]]) -> None:
        """Write the source address that an unbound socket gets, by destination.

        Only differences are written. Raises: OSError.
        """
        fd = self._fds["sources"]
        # Longest prefix first: otherwise a lookup could match a wider network while the narrower
        # one that is right is not written yet.
        ordered = sorted(sources, key=lambda pair: -pair[0].prefixlen)
        wanted = {layout.pack_route(net): layout.pack_source(src) for net, src in ordered}
        if not self._sources:
            size = 20
            self._sources = dict.fromkeys(libbpf.keys(fd, size), b"")
        if len(self._sources.keys() | wanted.keys()) > layout.SOURCES:
            self._delete_sources(self._sources)  # make space; meanwhile unbound flows are refused
            self._sources = {}
        for key, value in wanted.items():
            if self._sources.get(key) != value:
                libbpf.update(fd, key, value)
        self._delete_sources(self._sources.keys() - wanted.keys())
        self._sources = wanted
        self._raise_generation()

    def _delete_sources(self, routes: Iterable[bytes]) -> None:
        """Delete sources, shortest prefix first, so that none matches for a deleted longer one."""
        for key in sorted(routes, key=INDEX.unpack_from):
            libbpf.delete(self._fds["sources"], key)

    # --- refusals -------------------------------------------------------------------

    def open_ring(self, on_refusal: Callable[[FlowRefused], None]) -> int:
        """Start to read refusals; return a descriptor to poll.

        Call `drain` when it is readable. Two readers would each miss the other's records, so an
        instance has one controller. Raises: OSError.
        """

        def on_record(record: bytes) -> None:
            on_refusal(layout.unpack_event(record))

        self._ring = Ring(self._fds["events"], on_record)
        return self._ring.fd

    def drain(self) -> None:
        """Pass waiting refusals, a bounded number of them, to the callback of `open_ring`.

        Raises: OSError; LayoutError for a record that no hook can have written.
        """
        if self._ring is not None:
            self._ring.consume()


@dataclass
class _Found:
    """What a comparison of a table has found."""

    right: int = 0
    wrong: dict[Ternary, Entry | None] = field(default_factory=dict)  # or missing, as it should be
    strange: list[bytes] = field(default_factory=list)  # keys that should not be there
    filtered: bool = True  # whether the filter has the bits of those that are right


def _slices(items: Iterator[T]) -> Iterator[list[T]]:
    """Yield items as lists of `ENTRIES_PER_TURN`."""
    while some := list(islice(items, ENTRIES_PER_TURN)):
        yield some


def _differences(there: Table, wanted: Table) -> Iterator[list[Difference]]:
    """Yield the changes that make one table the other, of so many entries at a time.

    The first one may change meanwhile.
    """
    for mask, row in list(there.rows.items()):
        kept = wanted.rows.get(mask, {})
        for some in _slices(iter(list(row))):
            yield [(Ternary(value, mask), None) for value in some if value not in kept]
    for entries in _slices(wanted.entries()):
        yield [one for one in entries if there.get(one[0]) != one[1]]
