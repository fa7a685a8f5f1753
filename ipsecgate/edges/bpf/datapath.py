"""Write the hooks' tables and receive their refusals. No decisions.

Publishing has no window: the new table's entries and masks are written beside
the old one's (their own space), then one word switches the epoch, and only
after an RCU grace period, when no hook can still be looking at it, is the old
space cleared. The grace period is the kernel's own: an update of a map of maps
waits for one (kernel/bpf/syscall.c, maybe_wait_bpf_programs()).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable

from ipsecgate.core.model.events import FlowRefused
from ipsecgate.core.model.flow import Address, Network
from ipsecgate.core.tables import layout
from ipsecgate.core.tables.layout import INDEX, SETTING, Entry, Key, LayoutError, Setting, TableId
from ipsecgate.core.tables.table import Table
from ipsecgate.edges.bpf import libbpf
from ipsecgate.edges.bpf.maps import EPOCH, Maps, boot_time
from ipsecgate.edges.bpf.pins import Pins

BATCH = 256  # entries between two turns of the loop


class Datapath(Maps):
    """The maps of one loaded instance, open for its one controller."""

    def __init__(self, pins: Pins) -> None:
        super().__init__(pins)
        self._sources: dict[bytes, bytes] = {}
        self._ring: libbpf.Ring | None = None
        template = libbpf.MapShape(libbpf.MAP_TYPE_ARRAY, 4, 4, 1)
        outer = libbpf.MapShape(libbpf.MAP_TYPE_ARRAY_OF_MAPS, 4, 4, 1)
        self._inner = libbpf.create_map("grace_inner", template)
        self._grace = libbpf.create_map("grace", outer, inner=self._inner)
        self._keys: dict[int, list[bytes]] = {}  # by space, as written
        self._clearing: dict[int, asyncio.Task[None]] = {}  # by space
        self._adopt()

    def close(self) -> None:
        """Close every descriptor; the pins and what they refuse stay."""
        if self._ring is not None:
            self._ring.close()
        for fd in (self._inner, self._grace):
            os.close(fd)
        super().close()

    # --- settings -----------------------------------------------------------------

    def set(self, which: Setting, value: int) -> None:
        """Write one word: in force for the next call of any hook."""
        libbpf.update(self._fds["settings"], INDEX.pack(which), SETTING.pack(value))
        if which is Setting.DENY:
            self._changed()  # sockets remember what the default allowed

    # --- tables -------------------------------------------------------------------

    def _adopt(self) -> None:
        """Learn what a predecessor published; clear what it left half-written."""
        self._changed()  # it may have died between a table and its generation
        self._wait_grace_period()  # or right after a switch
        current = {layout.space(table, self.setting(EPOCH[table])) for table in TableId}
        self._keys = {space: [] for space in current}
        for raw in list(libbpf.keys(self._fds["entries"], layout.KEY_SIZE)):
            space = raw[layout.SPACE_OFFSET]
            if space in current:
                self._keys[space].append(raw)
            else:
                libbpf.delete(self._fds["entries"], raw)

    async def publish(self, table: TableId, content: Table) -> None:
        """Replace a table at once; the old one is cleared behind the caller's back.

        Raises: OSError when the maps are full (the old table stays in force).
        """
        epoch = self.setting(EPOCH[table])
        old, new = layout.space(table, epoch), layout.space(table, epoch + 1)
        if new in self._clearing:  # published faster than grace periods pass
            await self._clearing[new]
        self._keys[new] = []
        boot = boot_time()
        try:
            for (index, key), entry in content.entries.items():
                raw = layout.pack_key(key, new, index)
                libbpf.update(self._fds["entries"], raw, layout.pack_entry(entry, boot))
                self._keys[new].append(raw)
        except OSError:
            self._clear(new)
            raise
        libbpf.update(self._fds["masks"], INDEX.pack(new), layout.pack_masks(content.masks))
        self.set(EPOCH[table], epoch + 1)
        self._changed()
        self._clearing[old] = asyncio.create_task(self._clear_later(old))

    def set_entry(self, table: TableId, index: int, key: Key, entry: Entry) -> None:
        """Change one entry of the published table: one atomic write."""
        raw = layout.pack_key(key, layout.space(table, self.setting(EPOCH[table])), index)
        libbpf.update(self._fds["entries"], raw, layout.pack_entry(entry, boot_time()))
        self._changed()

    async def verify(self, table: TableId, content: Table) -> int:
        """Make the published table be this one again; return how many entries were not.

        It takes turns with whatever else there is to do, and is given up when the table
        changes meanwhile: then somebody has just written it.
        """
        epoch, fd = self.setting(EPOCH[table]), self._fds["entries"]
        generation = self.setting(Setting.GENERATION)
        space, boot = layout.space(table, epoch), boot_time()
        masks, mended = layout.pack_masks(content.masks), 0
        if libbpf.lookup(self._fds["masks"], INDEX.pack(space), len(masks)) != masks:
            libbpf.update(self._fds["masks"], INDEX.pack(space), masks)
            mended += 1
        wanted = {layout.pack_key(k, space, i): entry for (i, k), entry in content.entries.items()}
        there = [k for k in libbpf.keys(fd, layout.KEY_SIZE) if k[layout.SPACE_OFFSET] == space]
        for count, raw in enumerate(dict.fromkeys([*wanted, *there])):
            if count % BATCH == 0:
                await asyncio.sleep(0)
                if self.setting(Setting.GENERATION) != generation:
                    return mended
            if raw not in wanted:
                libbpf.delete(fd, raw)
            elif self._entry(raw, boot) != wanted[raw]:
                libbpf.update(fd, raw, layout.pack_entry(wanted[raw], boot))
            else:
                continue
            mended += 1
        self._keys[space] = list(wanted)
        if mended:
            self._changed()
        return mended

    def _entry(self, raw: bytes, boot: int) -> Entry | None:
        value = libbpf.lookup(self._fds["entries"], raw, layout.ENTRY_SIZE)
        try:
            return layout.unpack_entry(value, boot) if value else None
        except LayoutError:
            return None

    def _changed(self) -> None:
        """Have every socket asked anew: what it is associated with may be gone."""
        self.set(Setting.GENERATION, self.setting(Setting.GENERATION) + 1)

    @property
    def clearing(self) -> bool:
        """Tell whether an old table is still being cleared."""
        return bool(self._clearing)

    async def _clear_later(self, space: int) -> None:
        await asyncio.to_thread(self._wait_grace_period)
        self._clear(space)
        del self._clearing[space]

    def _wait_grace_period(self) -> None:
        libbpf.update(self._grace, INDEX.pack(0), INDEX.pack(self._inner))

    def _clear(self, space: int) -> None:
        for raw in self._keys.pop(space, ()):
            libbpf.delete(self._fds["entries"], raw)

    # --- sources ------------------------------------------------------------------

    def set_sources(self, sources: Iterable[tuple[Network, Address | None]]) -> None:
        """Make the map say which source an unbound socket gets: changes only."""
        fd = self._fds["sources"]
        # The longest first: a wider one must not answer for a narrower that is still to come.
        ordered = sorted(sources, key=lambda pair: -pair[0].prefixlen)
        wanted = {layout.pack_route(net): layout.pack_source(src) for net, src in ordered}
        if not self._sources:
            size = 20
            self._sources = dict.fromkeys(libbpf.keys(fd, size), b"")
        if len(self._sources.keys() | wanted.keys()) > layout.SOURCES:
            self._forget(self._sources)  # make room: meanwhile what is not bound is refused
            self._sources = {}
        for key, value in wanted.items():
            if self._sources.get(key) != value:
                libbpf.update(fd, key, value)
        self._forget(self._sources.keys() - wanted.keys())
        self._sources = wanted
        self._changed()

    def _forget(self, routes: Iterable[bytes]) -> None:
        """Delete sources, the widest first: it must not answer for a narrower that is gone."""
        for key in sorted(routes, key=INDEX.unpack_from):
            libbpf.delete(self._fds["sources"], key)

    # --- what the hooks tell --------------------------------------------------------

    def open_ring(self, on_refusal: Callable[[FlowRefused], None]) -> int:
        """Start reading refusals; return a descriptor to watch for reading.

        Call `drain` when it is readable. A second reader of one ring would steal
        from the first: one controller an instance.
        """

        def on_record(record: bytes) -> None:
            on_refusal(layout.unpack_event(record))

        self._ring = libbpf.Ring(self._fds["events"], on_record)
        return self._ring.fd

    def drain(self) -> None:
        """Hand waiting refusals to the callback given to `open_ring`, a bounded number.

        Raises: OSError, LayoutError.
        """
        if self._ring is not None:
            self._ring.consume()
