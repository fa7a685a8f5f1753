"""Write the hooks' tables and receive their refusals.

Hooks see either the old table or the new one, never a mixture. Publishing writes the new entries
and masks beside the old ones, in a space of their own. Then one word, the epoch, switches to that
space. The old space is cleared only after an RCU grace period, when no hook can still be searching
it. To wait for one, we update a map of maps: the kernel waits there for running programs
(kernel/bpf/syscall.c, maybe_wait_bpf_programs()).
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
from ipsecgate.edges.bpf.ring import Ring

BATCH = 256  # entries written before the event loop gets a turn


class Datapath(Maps):
    """The maps of one loaded instance, kept open by its only controller."""

    def __init__(self, pins: Pins) -> None:
        """Open every map, and clear what a predecessor left half-written. Raises: OSError."""
        super().__init__(pins)
        self._sources: dict[bytes, bytes] = {}
        self._ring: Ring | None = None
        template = libbpf.MapShape(libbpf.MAP_TYPE_ARRAY, 4, 4, 1)
        outer = libbpf.MapShape(libbpf.MAP_TYPE_ARRAY_OF_MAPS, 4, 4, 1)
        self._inner = libbpf.create_map("grace_inner", template)
        self._grace = libbpf.create_map("grace", outer, inner=self._inner)
        self._keys: dict[int, list[bytes]] = {}  # packed, by space
        self._clearing: dict[int, asyncio.Task[None]] = {}  # by space
        self._adopt()

    def close(self) -> None:
        """Close every descriptor; pins and links stay, and the hooks keep refusing."""
        if self._ring is not None:
            self._ring.close()
        for fd in (self._inner, self._grace):
            os.close(fd)
        super().close()

    # --- settings -----------------------------------------------------------------

    def set(self, which: Setting, value: int) -> None:
        """Write one word; it applies to the next call of any hook. Raises: OSError."""
        libbpf.update(self._fds["settings"], INDEX.pack(which), SETTING.pack(value))
        if which is Setting.DENY:
            self._raise_generation()  # sockets remember what the default allowed

    # --- tables -------------------------------------------------------------------

    def _adopt(self) -> None:
        """Take over the tables that a predecessor published, and delete all other entries."""
        self._raise_generation()  # it may have died between writing a table and doing this
        self._wait_grace_period()  # or right after a switch, while hooks searched the old table
        current = {layout.space(table, self.setting(EPOCH[table])) for table in TableId}
        self._keys = {space: [] for space in current}
        for raw in list(libbpf.keys(self._fds["entries"], layout.KEY_SIZE)):
            space = raw[layout.SPACE_OFFSET]
            if space in current:
                self._keys[space].append(raw)
            else:
                libbpf.delete(self._fds["entries"], raw)

    async def publish(self, table: TableId, content: Table) -> None:
        """Replace a table atomically; a task of its own clears the old one later.

        Raises: OSError if the maps are full; then the old table stays in force.
        """
        epoch = self.setting(EPOCH[table])
        old, new = layout.space(table, epoch), layout.space(table, epoch + 1)
        if new in self._clearing:  # the second publication within one grace period
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
        self._raise_generation()
        self._clearing[old] = asyncio.create_task(self._clear_later(old))

    def set_entry(self, table: TableId, index: int, key: Key, entry: Entry) -> None:
        """Change one entry of the published table by one atomic write. Raises: OSError."""
        raw = layout.pack_key(key, layout.space(table, self.setting(EPOCH[table])), index)
        libbpf.update(self._fds["entries"], raw, layout.pack_entry(entry, boot_time()))
        self._raise_generation()

    async def repair(self, table: TableId, content: Table) -> int:
        """Restore the published table to this content; return how many entries differed.

        Works in batches, and stops early if the controller changes a table in between.
        Raises: OSError.
        """
        epoch, fd = self.setting(EPOCH[table]), self._fds["entries"]
        generation = self.setting(Setting.GENERATION)
        space, boot = layout.space(table, epoch), boot_time()
        masks, repaired = layout.pack_masks(content.masks), 0
        if libbpf.lookup(self._fds["masks"], INDEX.pack(space), len(masks)) != masks:
            libbpf.update(self._fds["masks"], INDEX.pack(space), masks)
            repaired += 1
        wanted = {layout.pack_key(k, space, i): entry for (i, k), entry in content.entries.items()}
        present = [k for k in libbpf.keys(fd, layout.KEY_SIZE) if k[layout.SPACE_OFFSET] == space]
        for count, raw in enumerate(dict.fromkeys([*wanted, *present])):
            if count % BATCH == 0:
                await asyncio.sleep(0)
                if self.setting(Setting.GENERATION) != generation:
                    return repaired
            if raw not in wanted:
                libbpf.delete(fd, raw)
            elif self._entry(raw, boot) != wanted[raw]:
                libbpf.update(fd, raw, layout.pack_entry(wanted[raw], boot))
            else:
                continue
            repaired += 1
        self._keys[space] = list(wanted)
        if repaired:
            self._raise_generation()
        return repaired

    def _entry(self, raw: bytes, boot: int) -> Entry | None:
        value = libbpf.lookup(self._fds["entries"], raw, layout.ENTRY_SIZE)
        try:
            return layout.unpack_entry(value, boot) if value else None
        except LayoutError:
            return None

    def _raise_generation(self) -> None:
        """Make the hooks judge every socket again: the SA that covered it may be gone."""
        self.set(Setting.GENERATION, self.setting(Setting.GENERATION) + 1)

    @property
    def clearing(self) -> bool:
        """Whether an old table is still waiting to be cleared."""
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
            self._delete_sources(self._sources)  # make room; meanwhile unbound flows are refused
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
