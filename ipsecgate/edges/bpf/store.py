"""The hooks' entries, and the slots that find them: two maps that are mapped into our memory.

Rules of this module: an entry is not changed where a hook may read it. A new one is written
elsewhere, then its place says so. What was there is free only when the next generation has begun.
Slots that are full are filled again in another map, beside the one in use.
"""

from __future__ import annotations

import ctypes as ct
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from ipsecgate.core.tables import packed
from ipsecgate.core.tables.index import Mark, mark
from ipsecgate.core.tables.layout import ENTRIES, KEY_SIZE, LINE, MASKS, LayoutError, key_hash
from ipsecgate.core.tables.packed import ENTRY_SIZE
from ipsecgate.core.tables.slots import CrowdedError, Slots, bits_for
from ipsecgate.edges.bpf import libbpf
from ipsecgate.edges.bpf.nested import Nest, larger

CHUNK = 4096  # entries that are read at a time
SLOT = 4  # bytes
SPARE = 4  # the entries grow by a quarter more than necessary
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

    def _raw(self, number: int) -> bytes:
        return self._entries[number * ENTRY_SIZE : (number + 1) * ENTRY_SIZE]

    def _key(self, number: int) -> bytes:
        return self._entries[number * ENTRY_SIZE : number * ENTRY_SIZE + KEY_SIZE]

    def _places(self) -> Iterator[tuple[int, int]]:
        """Yield where places are, and the numbers of their entries, if there are such entries."""
        count = len(self._entries) // ENTRY_SIZE
        return (one for one in self._slots.places() if one[1] < count)

    def close(self) -> None:
        """Give the memory back."""
        self._slots = self._table(EMPTY, (0, 0))
        self._entries.close()

    def entries(self) -> Iterator[list[Stored]]:
        """Yield all entries, some at a time."""
        some = []
        for place, number in self._places():
            some.append(Stored(place, self._raw(number)))
            if len(some) == CHUNK:
                yield some
                some = []
        yield some


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
        self._more = 0, 0  # slots of the index, and places, for which there is space
        self.recount()

    def recount(self) -> None:
        """Find out which entries are free: all that have no place."""
        used = {number for _, number in self._places()}
        self._next = max(used, default=-1) + 1
        self._free = [number for number in range(self._next) if number not in used]
        self._old = []

    def make_space(self, writes: int, more: tuple[int, int]) -> None:
        """Have space for so many entries, and for `more` slots (`Space.slots`).

        Raises: OSError; LayoutError if there may not be so many.
        """
        needed = self._next - len(self._free) + writes
        if needed > ENTRIES:
            raise LayoutError(f"{needed} entries, the tables hold {ENTRIES}")
        if needed * ENTRY_SIZE > len(self._entries):
            self._grow(min(needed + needed // SPARE + SPARE, ENTRIES))
        self._more = more
        if self._slots.bits == (0, 0) or self._slots.is_full(more):
            self.fill()

    def _grow(self, count: int) -> None:
        """Replace the entries by a larger map with the same content. Raises: OSError."""
        with self._larger(self._entries_map, 0, count) as fd:
            made = mmap.mmap(fd, count * ENTRY_SIZE)
            made[: len(self._entries)] = self._entries[:]
            self._entries_map.put(0, fd)
        self._entries.close()
        self._entries = made

    def fill(self, least: int = 0) -> None:
        """Fill new slots for all entries, and use them.

        `least`: bits for the places, at least. Raises: OSError.
        """
        # A hook that still searches the slots before these has read which, but may not have found
        # the map: it would take the new one for it.
        self._slots_map.wait(self._which)
        found = []
        for _, number in self._places():
            raw = self._raw(number)
            found.append((packed.hash_of_entry(raw), number, self._mark_of(raw)))
        masks = len({(one.hash, one.slot % MASKS) for _, _, one in found})
        bits = bits_for(masks + self._more[0]), max(least, bits_for(len(found) + self._more[1]))
        which = 1 - self._which
        while True:
            count = (1 << bits[0]) + (1 << bits[1])
            with self._larger(self._slots_map, which, count // LINE) as fd:
                made = self._table(mmap.mmap(fd, count * SLOT), bits)
                try:
                    for hash_, number, one in found:
                        made.put(hash_, self._key(number), number)
                        made.mark(one)
                except CrowdedError:
                    bits = bits[0], bits[1] + 1
                    continue
                self._slots_map.put(which, fd)
            break
        self._use(which << 16 | bits[1] << 8 | bits[0])
        self._which, self._slots = which, made

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

    def put(self, raw: bytes) -> None:
        """Write a struct gate_entry, in place of the one that has its key. Raises: OSError."""
        number = self._free.pop() if self._free else self._next
        self._next += number == self._next
        self._entries[number * ENTRY_SIZE : (number + 1) * ENTRY_SIZE] = raw
        key, hash_ = packed.key_of_entry(raw), packed.hash_of_entry(raw)
        try:
            old = self._slots.put(hash_, key, number)
        except CrowdedError:
            self.fill(self._slots.bits[1] + 1)
            old = self._slots.put(hash_, key, number)
        if old is not None:
            self._old.append(old)

    def remove(self, key: bytes) -> None:
        """Remove the entry of a key, if there is one."""
        old = self._slots.remove(key_hash(key), key)
        if old is not None:
            self._old.append(old)

    def correct(self, place: int, raw: bytes) -> None:
        """Write an entry where it is: hooks that read it meanwhile see that, and read again."""
        at = self._slots.number_at(place) * ENTRY_SIZE
        self._entries[at : at + ENTRY_SIZE] = raw

    def forget(self, place: int) -> None:
        """Remove the entry that a place says."""
        self._old.append(self._slots.forget(place))

    def settle(self) -> None:
        """Use the space of removed entries again: the next generation has begun."""
        self._free += self._old
        self._old = []
