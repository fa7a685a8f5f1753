"""The hooks' entries, and the slots that find them: two maps that are mapped into our memory.

Rules of this module: an entry is not changed where a hook may read it. A new one is written
elsewhere, then its place says so. What was there is free only when the next generation has begun.
Slots that are full are filled again in another map, beside the one in use. Work in proportion to
the entries is done in parts, and `pause` is awaited between them; meanwhile entries may be
corrected, but nothing else may be written.
"""

from __future__ import annotations

import asyncio
import ctypes as ct
import mmap
import os
from collections.abc import Callable, Container, Iterator, Set
from contextlib import contextmanager
from typing import NamedTuple

from ipsecgate.core.tables import packed
from ipsecgate.core.tables.index import Mark, mark
from ipsecgate.core.tables.layout import ENTRIES, KEY_SIZE, LINE, MASKS, LayoutError, key_hash
from ipsecgate.core.tables.packed import ENTRY_SIZE
from ipsecgate.core.tables.slots import PART, CrowdedError, Slots, bits_for
from ipsecgate.edges.bpf import libbpf
from ipsecgate.edges.bpf.nested import Nest, larger
from ipsecgate.edges.bpf.parts import ENTRIES_PER_PART, Pause, drop

SLOT = 4  # bytes
SPARE = 4  # the entries grow by a quarter more than necessary
SCANNED = 1 << 16  # entries that are searched in one go for an `id`
EMPTY = bytes(2 * SLOT)  # slots of which none is used

# __NR_membarrier where stores may be reordered, and a command of it that is a full barrier.
_MEMBARRIER = {"aarch64": 283}.get(os.uname().machine)
_GLOBAL_EXPEDITED = 2


def order_writes() -> None:
    """Have hooks see what was written to our maps before what is written next.

    Raises: OSError. Source: membarrier(2).
    """
    if _MEMBARRIER is None:
        return
    if ct.CDLL(None, use_errno=True).syscall(_MEMBARRIER, _GLOBAL_EXPEDITED, 0, 0):
        raise OSError(ct.get_errno(), f"membarrier: {os.strerror(ct.get_errno())}")


_Found = tuple[int, int, Mark]
"""An entry's hash, its number, and what the index says of it."""


class Stored(NamedTuple):
    """A struct gate_entry, and where its place is."""

    place: int
    raw: bytes


class Stock:
    """The maps `entries` and `slots`, to read; `setting`: what GATE_SLOTS is."""

    def __init__(self, entries: Nest, slots: Nest, setting: int, access: int = mmap.ACCESS_READ):
        """Map them. Raises: OSError."""
        self._entries_map, self._slots_map = entries, slots
        self._access = access
        self._which = setting >> 16  # of the slots is in use
        self._entries = self._opened(entries, 0, ENTRY_SIZE)
        self._slots = self._table(
            self._opened(slots, self._which, LINE * SLOT), (setting & 0xFF, setting >> 8 & 0xFF)
        )

    def _opened(self, nest: Nest, at: int, size: int) -> mmap.mmap:
        with libbpf.closing_fd(nest.take(at)) as fd:
            return mmap.mmap(fd, libbpf.map_shape(fd).max_entries * size, access=self._access)

    def _table(self, memory: mmap.mmap | bytes, bits: tuple[int, int]) -> Slots:
        """Return the tables in a memory, which is kept open as long as they are."""
        return Slots(memoryview(memory).cast("I"), bits, self._key)

    def raw(self, number: int) -> bytes:
        """Return the entry of a number."""
        return self._entries[number * ENTRY_SIZE : (number + 1) * ENTRY_SIZE]

    def _key(self, number: int) -> bytes:
        return self._entries[number * ENTRY_SIZE : number * ENTRY_SIZE + KEY_SIZE]

    def _places(self) -> Iterator[list[tuple[int, int]]]:
        """Yield where places are, and the numbers of their entries, if there are such entries.

        They come in parts, some of which are empty.
        """
        count = len(self._entries) // ENTRY_SIZE
        return ([one for one in part if one[1] < count] for part in self._slots.places())

    def close(self) -> None:
        """Give the memory back."""
        self._slots = self._table(EMPTY, (0, 0))
        self._entries.close()

    def find(self, key: bytes) -> Stored | None:
        """Return the entry of a key."""
        place = self._slots.find_place(key_hash(key), key)
        return None if place is None else Stored(place, self.raw(self._slots.number_at(place)))

    def entries(self) -> Iterator[list[Stored]]:
        """Yield all entries in parts, some of which are empty."""
        for part in self._places():
            yield [Stored(place, self.raw(number)) for place, number in part]


class Store(Stock):
    """The same, to write; `use` sets GATE_SLOTS, `level_of` knows a table's mask by its number."""

    def __init__(
        self,
        entries: Nest,
        slots: Nest,
        setting: int,
        use: Callable[[int], None],
        level_of: Callable[[int, int], int],
    ) -> None:
        entries.settle(0)
        for which in range(2):
            slots.settle(which)
        super().__init__(entries, slots, setting, mmap.ACCESS_WRITE)
        self._use = use
        self._level_of = level_of
        self._old: list[int] = []
        self._free: list[int] = []
        self._next = 0
        self._larger_entries: mmap.mmap | None = None  # while they are being filled
        self._more = 0, 0  # slots of the index, and places, for which there is space

    async def count(self, pause: Pause) -> None:
        """Find out what is free; before this, entries may be corrected but not written."""
        for _ in self._slots.count():
            await pause()
        used = bytearray(len(self._entries) // ENTRY_SIZE)
        for part in self._places():
            for _, number in part:
                used[number] = True
            await pause()
        self._next = used.rfind(True) + 1
        self._free, self._old = [], []
        for first in range(0, self._next, PART):
            numbers = range(first, min(first + PART, self._next))
            self._free += [number for number in numbers if not used[number]]
            await pause()

    async def make_space(self, writes: int, more: tuple[int, int], pause: Pause) -> None:
        """Have space for so many entries, and for `more` slots (`Space.slots`).

        Raises: OSError; LayoutError if there may not be so many.
        """
        needed = self._next - len(self._free) + writes
        if needed > ENTRIES:
            raise LayoutError(f"{needed} entries, the tables hold {ENTRIES}")
        if needed * ENTRY_SIZE > len(self._entries):
            await self._grow(min(needed + needed // SPARE + SPARE, ENTRIES), pause)
        self._more = more
        if self._slots.bits == (0, 0) or self._slots.is_full(more):
            await self.fill(pause)

    async def _grow(self, count: int, pause: Pause) -> None:
        """Replace the entries by a larger map with the same content. Raises: OSError."""
        with self._larger(self._entries_map, 0, count) as fd:
            self._larger_entries = made = mmap.mmap(fd, count * ENTRY_SIZE)
            try:
                for at in range(0, len(self._entries), PART * ENTRY_SIZE):
                    part = self._entries[at : at + PART * ENTRY_SIZE]
                    made[at : at + len(part)] = part
                    await pause()
                await asyncio.to_thread(self._entries_map.put, 0, fd)  # waits for the hooks
            finally:
                self._larger_entries = None
        self._entries.close()
        self._entries = made

    async def fill(self, pause: Pause, least: int = 0) -> None:
        """Fill new slots for all entries, and use them.

        `least`: bits for the places, at least. Raises: OSError.
        """
        # A hook that still searches the slots before these has read which, but may not have found
        # the map: it would take the new one for it.
        await asyncio.to_thread(self._slots_map.wait, self._which)
        which, more_bits = 1 - self._which, 0
        while True:
            found, masks = await self._found(pause)
            marks, places = masks + self._more[0], len(found) + self._more[1]
            bits = bits_for(marks), max(least, bits_for(places)) + more_bits
            count = (1 << bits[0]) + (1 << bits[1])
            with self._larger(self._slots_map, which, count // LINE) as fd:
                made = self._table(mmap.mmap(fd, count * SLOT), bits)
                try:
                    await self._put_all(made, found, pause)
                except CrowdedError:
                    more_bits += 1
                    continue
                await asyncio.to_thread(self._slots_map.put, which, fd)  # waits for the hooks
            break
        self._use(which << 16 | bits[1] << 8 | bits[0])
        self._which, self._slots = which, made

    async def _found(self, pause: Pause) -> tuple[list[_Found], int]:
        """Return all entries, and how many marks they need."""
        found: list[_Found] = []
        masks = set()
        for part in self._places():
            for _, number in part:
                raw = self.raw(number)
                one = self._mark_of(raw)
                masks.add((one.hash, one.slot % MASKS))
                found.append((packed.hash_of_entry(raw), number, one))
            await pause()
        count = len(masks)
        await drop(masks, pause)
        return found, count

    async def _put_all(self, slots: Slots, found: list[_Found], pause: Pause) -> None:
        """Put entries into slots, and forget them part by part, as `drop` does."""
        while found:
            for hash_, number, one in found[-ENTRIES_PER_PART:]:
                slots.put(hash_, self._key(number), number)
                slots.mark(one)
            del found[-ENTRIES_PER_PART:]
            await pause()

    @contextmanager
    def _larger(self, nest: Nest, at: int, count: int) -> Iterator[int]:
        with libbpf.closing_fd(nest.take(at)) as like:
            made = larger(like, nest.name, count)
        with libbpf.closing_fd(made):
            yield made

    def mark(self, one: Mark) -> None:
        """Have the index say that a mask has an entry."""
        self._slots.mark(one)

    def is_marked(self, raw: bytes) -> bool:
        """Return whether the index says that a mask has this entry."""
        return self._slots.is_marked(self._mark_of(raw))

    def _mark_of(self, raw: bytes) -> Mark:
        table, mask, daddr, hash_ = packed.where_of_entry(raw)
        return mark(table, mask, self._level_of(table, mask), daddr, hash_)

    @property
    def place_bits(self) -> int:
        """Return how many bits the table of places has."""
        return self._slots.bits[1]

    def put(self, raw: bytes) -> None:
        """Write a struct gate_entry, in place of the one that has its key.

        Raises: CrowdedError; `fill` helps, with more bits for the places.
        """
        number = self._free[-1] if self._free else self._next
        self._entries[number * ENTRY_SIZE : (number + 1) * ENTRY_SIZE] = raw
        old = self._slots.put(packed.hash_of_entry(raw), packed.key_of_entry(raw), number)
        if self._free:
            self._free.pop()
        else:
            self._next += 1
        if old is not None:
            self._old.append(old)

    def remove(self, key: bytes) -> None:
        """Remove the entry of a key, if there is one."""
        old = self._slots.remove(key_hash(key), key)
        if old is not None:
            self._old.append(old)

    def with_ids(self, ids: Container[int]) -> Iterator[list[int]]:
        """Yield the numbers of the entries that have an answer with one of these `id`s, in parts.

        They are found by their contents: some may be of no place at all.
        """
        size = ENTRY_SIZE // packed.WORD
        for first in range(0, len(self._entries) // ENTRY_SIZE, SCANNED):
            part = self._entries[first * ENTRY_SIZE : (first + SCANNED) * ENTRY_SIZE]
            words = memoryview(part).cast("I")
            found: set[int] = set()
            for at in packed.ID_WORDS:
                column = words[at::size].tolist()
                if not (isinstance(ids, Set) and ids.isdisjoint(column)):  # a third of the time
                    found.update(n for n, word in enumerate(column, first) if word in ids)
            yield sorted(found)

    def correct(self, place: int, raw: bytes) -> None:
        """Write an entry where it is: hooks that read it meanwhile see that, and read again."""
        self.correct_entry(self._slots.number_at(place), raw)

    def correct_entry(self, number: int, raw: bytes) -> None:
        """Do the same with an entry by its number."""
        at = number * ENTRY_SIZE
        for entries in (self._larger_entries, self._entries):
            if entries is not None:
                entries[at : at + ENTRY_SIZE] = raw

    def forget(self, place: int) -> None:
        """Remove the entry that a place says."""
        self._old.append(self._slots.forget(place))

    def settle(self) -> None:
        """Use the space of removed entries again: the next generation has begun."""
        self._free += self._old
        self._old = []
