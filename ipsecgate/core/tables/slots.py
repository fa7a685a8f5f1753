"""The hooks' tables of slots: what finds an entry (bpf/gate.h, GATE_SLOTS).

Rules of this module: it writes the memory that it is given, slot by slot, and a hook may search it
meanwhile. So what an entry needs is written before the entry is in force.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ipsecgate.core.tables.index import Mark
from ipsecgate.core.tables.layout import GONE, MASKS, PLACE_BITS, PROBES

SMALLEST = 12  # bits
PART = 1024  # slots that are read in one go: at most some 400 of them say where an entry is
_TAG = GONE >> PLACE_BITS << PLACE_BITS  # bits of a place that are the hash's
SPARSE = 4  # filled, at most one slot in 4 is used …
FULL = 3, 8  # … and later, at most 3 in 8


class CrowdedError(Exception):
    """Too many slots in a row are used; more bits help."""


def bits_for(count: int) -> int:
    """Return how many bits a table for so many slots needs."""
    return max(SMALLEST, (SPARSE * count - 1).bit_length())


class _Table:
    """One table; the highest `bits` bits of a hash say at which slot to begin."""

    def __init__(self, slots: memoryview, bits: int) -> None:
        self.slots = slots
        self.bits = bits
        self.used = 0

    def is_full(self, more: int) -> bool:
        return self.used + more > (1 << self.bits) * FULL[0] // FULL[1]

    def parts(self) -> Iterator[tuple[int, list[int]]]:
        """Yield where each part begins, and its slots."""
        return ((at, self.slots[at : at + PART].tolist()) for at in range(0, 1 << self.bits, PART))

    def walk(self, hash_: int) -> Iterator[tuple[int, int]]:
        """Yield where slots are and what they say, up to the first that is 0."""
        at, last, slot = hash_ >> 64 - self.bits, (1 << self.bits) - 1, 1
        while slot:
            slot = self.slots[at]
            yield at, slot
            at = (at + 1) & last

    def set(self, at: int, slot: int) -> None:
        self.used += not self.slots[at]
        self.slots[at] = slot


class Slots:
    """The index and the places, in one memory of 32-bit slots.

    `bits`: of each of the two. `key_of` returns the key of an entry by its number. A memory that is
    not empty must be counted (`count`) before `is_full` is asked.
    """

    def __init__(
        self, memory: memoryview, bits: tuple[int, int], key_of: Callable[[int], bytes]
    ) -> None:
        first = 1 << bits[0]
        self.bits = bits
        self._index = _Table(memory[:first], bits[0])
        self._places = _Table(memory[first : first + (1 << bits[1])], bits[1])
        self._key_of = key_of

    def is_full(self, more: tuple[int, int]) -> bool:
        """Tell whether larger tables are needed before so many slots of each are added."""
        return self._index.is_full(more[0]) or self._places.is_full(more[1])

    def mark(self, mark: Mark) -> None:
        """Have the index say that a mask has an entry."""
        for at, slot in self._index.walk(mark.hash):
            if not slot or not (slot ^ mark.slot) % MASKS:
                self._index.set(at, slot | mark.slot)
                return

    def is_marked(self, mark: Mark) -> bool:
        """Return whether the index says that a mask has an entry."""
        return any(slot & mark.slot == mark.slot and not (slot ^ mark.slot) % MASKS
                   for slot in self.masks_at(mark.hash))  # fmt: skip

    def masks_at(self, hash_: int) -> Iterator[int]:
        """Yield the slots of the index that a hook tries for a prefix."""
        return (slot for _, slot in self._index.walk(hash_) if slot)

    def find(self, hash_: int, key: bytes) -> int | None:
        """Return the number of the entry of a key, None if there is none."""
        place = self.find_place(hash_, key)
        return None if place is None else self.number_at(place)

    def find_place(self, hash_: int, key: bytes) -> int | None:
        """Return the place that says where the entry of a key is."""
        places = self._places.walk(hash_)
        return next((at for at, slot in places if self._has(slot, hash_, key)), None)

    def put(self, hash_: int, key: bytes, number: int) -> int | None:
        """Say where the entry of a key is, and return where it was. Raises: CrowdedError."""
        wanted = number + 1 | hash_ & _TAG
        free = -1
        for probe, (at, slot) in enumerate(self._places.walk(hash_)):
            if self._has(slot, hash_, key):
                self._places.set(at, wanted)
                return _number(slot)
            if free < 0 and slot in (0, GONE):
                if probe >= PROBES:
                    break
                free = at
        if free < 0:
            raise CrowdedError
        self._places.set(free, wanted)
        return None

    def remove(self, hash_: int, key: bytes) -> int | None:
        """Forget where the entry of a key is, and return where it was."""
        place = self.find_place(hash_, key)
        return None if place is None else self.forget(place)

    def forget(self, at: int) -> int:
        """Forget a place, and return the number of the entry that was there."""
        number = self.number_at(at)
        self._places.set(at, GONE)
        return number

    def number_at(self, at: int) -> int:
        """Return the number of the entry that a place says."""
        return _number(self._places.slots[at])

    def places(self) -> Iterator[list[tuple[int, int]]]:
        """Yield all places, and the numbers of the entries, a part of the table at a time."""
        for first, part in self._places.parts():
            yield [
                (at, _number(slot)) for at, slot in enumerate(part, first) if slot and slot != GONE
            ]

    def count(self) -> Iterator[None]:
        """Count the slots that are used, in parts; meanwhile no unused one may be written."""
        for table in (self._index, self._places):
            used = 0
            for _, part in table.parts():
                used += len(part) - part.count(0)
                yield
            table.used = used

    def _has(self, slot: int, hash_: int, key: bytes) -> bool:
        if slot in (0, GONE) or (slot ^ hash_) & _TAG:
            return False
        return self._key_of(_number(slot)) == key


def _number(slot: int) -> int:
    return (slot & (1 << PLACE_BITS) - 1) - 1
