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
    """The map `filter`; `use` tells the hooks which of the two is in use, as GATE_FILTER has it.

    Of the one in use, this process maps only the part that the hooks look at: it counts as memory.
    """

    def __init__(self, fd: int, setting: int, use: Callable[[int], None]) -> None:
        self._fd = fd
        self._use = use
        self.setting = setting
        self._map: mmap.mmap | None = None
        self._words = memoryview(b"").cast("Q")
        self._set = FILTER_WORDS << 6  # bits that may be set: full until the first `fill`

    def close(self) -> None:
        """Give the memory back."""
        self._words.release()
        if self._map is not None:
            self._map.close()

    def add(self, hashes: Iterable[int]) -> None:
        """Set the bits of keys."""
        shift, words = self.setting >> 1, self._words
        count = 0
        for count, one in enumerate(hashes, 1):  # noqa: B007  the count is wanted
            bit = one >> shift
            words[bit >> 6] |= 1 << (bit & 63)
        self._set += count

    def lacks(self, hashes: Iterable[int]) -> bool:
        """Tell whether the bit of one of these keys is not set, though it should be."""
        shift, words = self.setting >> 1, self._words
        return any(not words[one >> shift >> 6] >> (one >> shift & 63) & 1 for one in hashes)

    def is_full(self, more: int) -> bool:
        """Tell whether it should be made again before so many bits are set."""
        bits = 64 - (self.setting >> 1)
        return self._set + more > 1 << min(bits - SPARSE + 1, FILTER_BITS - 3)

    def fill(self, hashes: Iterable[int], count: int) -> None:
        """Make it again for `count` keys, with space for as many more, and use it."""
        bits = min(max(SMALLEST, (2 * count).bit_length() + SPARSE), FILTER_BITS)
        self.setting = (64 - bits) << 1 | (not self.setting & 1)
        size = max(1 << bits - 3, mmap.PAGESIZE)
        half = (self.setting & 1) * FILTER_WORDS * 8
        self.close()
        self._map = mmap.mmap(self._fd, size, offset=half)
        self._map[:] = bytes(size)
        self._words = memoryview(self._map).cast("Q")
        self._set = 0
        self.add(hashes)
        self._use(self.setting)
