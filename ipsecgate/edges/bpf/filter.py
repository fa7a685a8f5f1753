"""The hooks' filter: a bit for each entry's key, so a mask without one for a flow costs little.

Rules of this module: a bit that an entry needs is set before the entry is there. Bits of entries
that are gone stay until the filter is made again, beside the one in use.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable

from ipsecgate.core.tables.layout import FILTER_BITS, FILTER_WORDS

SMALLEST = 12  # bits of a hash
SPARSE = 5  # so many bits more than entries need: one in 32 is set


class Filter:
    """The map `filter`; `use` tells the hooks which of the two is in use, as GATE_FILTER has it."""

    def __init__(self, fd: int, setting: int, use: Callable[[int], None]) -> None:
        self._map = mmap.mmap(fd, 2 * FILTER_WORDS * 8)
        self._words = memoryview(self._map).cast("Q")
        self._use = use
        self._setting = setting
        self._set = FILTER_WORDS << 6  # bits that may be set: full until the first `fill`

    def close(self) -> None:
        """Give the memory back."""
        self._words.release()
        self._map.close()

    def add(self, hashes: Iterable[int]) -> None:
        """Set the bits of keys."""
        self._add(hashes, self._setting)

    def _add(self, hashes: Iterable[int], setting: int) -> None:
        base, shift = (setting & 1) * FILTER_WORDS, setting >> 1
        for one in hashes:
            bit = one >> shift
            self._words[base + (bit >> 6)] |= 1 << (bit & 63)
            self._set += 1

    def is_full(self, more: int) -> bool:
        """Tell whether it should be made again before so many bits are set."""
        bits = 64 - (self._setting >> 1)
        return self._set + more > 1 << min(bits - SPARSE + 1, FILTER_BITS - 3)

    def fill(self, hashes: Iterable[int], count: int) -> None:
        """Make it again for `count` keys, with space for as many more, and use it."""
        bits = min(max(SMALLEST, (2 * count).bit_length() + SPARSE), FILTER_BITS)
        setting = (64 - bits) << 1 | (not self._setting & 1)
        base = (setting & 1) * FILTER_WORDS
        self._words[base : base + FILTER_WORDS] = memoryview(bytes(FILTER_WORDS * 8)).cast("Q")
        self._set = 0
        self._add(hashes, setting)
        self._use(setting)
        self._setting = setting
