"""Write the hooks' tables and receive their refusals.

A table changes with no window: entries are written for the next generation, then one word begins
it (`core.tables.image`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from itertools import chain

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

ENTRIES_PER_TURN = 4096  # written before other tasks of the loop get a turn


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
        """Replace a table's content, at once.

        The first time, when the hooks refuse everything anyway, other tasks run in between.
        Raises: OSError or LayoutError when the maps are full (the old table stays in force).
        """
        gone = [
            (match, None)
            for match, _ in self._images[table].table.entries()
            if content.get(match) is None
        ]
        changes = [*gone, *content.entries()]
        if not self.setting(LIST[table]):
            while len(changes) > ENTRIES_PER_TURN:
                self._write(table, changes[:ENTRIES_PER_TURN], listed=False)
                del changes[:ENTRIES_PER_TURN]
                await asyncio.sleep(0)
        self.change(table, changes)

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
        self._write(table, changes, listed=True)

    def _write(
        self, table: TableId, changes: Iterable[tuple[Ternary, Entry | None]], *, listed: bool
    ) -> None:
        """Write changes.

        `listed` False: nobody may find the entries yet, a later call publishes the table.
        """
        image, entries = self._images[table], self._fds["entries"]
        changes = list(changes)
        if self._filter.is_full(len(changes)):
            self._refill()  # first, because it begins a generation
        writes = image.change(changes, self.setting(Setting.GENERATION), boot_time())
        if not writes.puts and (self.setting(LIST[table]) or not listed):
            return
        self._filter.add(writes.hashes)
        try:
            libbpf.update_all(entries, writes.puts)
            if listed and (writes.masks or not self.setting(LIST[table])):
                self._list_masks(table)
            self._raise_generation()
        except OSError:
            self._undo(table, writes)
            raise
        for raw in writes.deletes:
            libbpf.delete(entries, raw)

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

    def _refill(self) -> None:
        """Fill the other filter, use it, and begin a generation."""
        images = self._images.values()
        count = sum(image.table.size for image in images)
        self._filter.fill(chain.from_iterable(image.hashes() for image in images), count)
        self._raise_generation()

    async def repair(self, table: TableId, content: Table) -> int:
        """Restore a published table to this content; return how many entries differed.

        Works in batches, and stops early if the controller changes a table in between.
        Raises: OSError.
        """
        generation = self.setting(Setting.GENERATION)
        raw: list[tuple[bytes, bytes]] = []
        for chunk in self._raw_entries(table):
            raw += chunk
            await asyncio.sleep(0)
            if self.setting(Setting.GENERATION) != generation:
                return 0
        image = self._images[table]
        listed = self._masks(table) == image.listed()
        self._images[table], strange = self._clean_image(table, raw, image.listed())
        there = self._images[table].table
        wrong: list[tuple[Ternary, Entry | None]] = [
            (match, None) for match, _ in there.entries() if content.get(match) is None
        ]
        wrong += [one for one in content.entries() if there.get(one[0]) != one[1]]
        if listed and not strange and not wrong:
            return 0
        if not listed:
            self._list_masks(table)
        self.change(table, wrong)
        self._refill()
        strange -= {self._images[table].key(match) for match, entry in wrong if entry is not None}
        return len(wrong) + len(strange) + (not listed)

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
