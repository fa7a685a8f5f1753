"""What one table looks like in the hooks' maps, and the writes that change it.

A change is written with the next generation and is in force when that begins (`GATE_GENERATION`):
until then the hooks take from each entry what it said before. So a change of many entries takes
effect at once, and a writer that dies in the middle of it has changed nothing.

Rules of this module: bytes out, no map. The caller writes `marks`, `levels`, `masks` and `puts`,
then begins the generation, and deletes last.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ipsecgate.core.tables import index, layout, packed
from ipsecgate.core.tables.index import Mark
from ipsecgate.core.tables.layout import MASKS, Entry, Key, TableId, TooManyMasksError
from ipsecgate.core.tables.table import Table, Ternary


@dataclass
class Writes:
    """What to write: entries, and what finds them."""

    puts: list[bytes] = field(default_factory=list)  # struct gate_entry
    deletes: list[bytes] = field(default_factory=list)  # keys
    masks: list[tuple[int, Key]] = field(default_factory=list)  # new ones, by number
    marks: list[Mark] = field(default_factory=list)  # of new keys, for the index
    levels: int = 0  # of new keys, as in GATE_LEVELS


@dataclass
class Space:
    """The slots that changes need: of the index for prefixes, and one for each new entry."""

    prefixes: set[tuple[Key, int]] = field(default_factory=set)
    entries: int = 0

    @property
    def slots(self) -> tuple[int, int]:
        """Return how many slots of the index, and how many places."""
        return len(self.prefixes), self.entries


class TableImage:
    """The entries of a table as the maps have them, and the number of each mask."""

    def __init__(self, table_id: TableId) -> None:
        self.table_id = table_id
        self.table = Table()
        self.levels = 0  # of all entries so far, as in GATE_LEVELS
        self._numbers: dict[Key, int] = {}
        self._mask: dict[int, Key] = {}  # by its number
        self._level: dict[int, int] = {}  # of a mask, by its number
        self._unused = 0  # no mask has had this number, or a higher one
        self._free: list[int] = []  # lower ones that are free

    def adopt(self, key: bytes, mask: Key | None, entry: Entry) -> bool:
        """Take in an entry that is in the maps already; return whether it belongs to this table.

        `mask`: what the maps have under the mask's number that the key names.
        """
        _, number, value = layout.unpack_key(key)
        if mask is None or value.masked(mask) != value:
            return False
        if self._numbers.get(mask) is None:
            self._reserve(number)
            self._number(mask, number)
        elif self._numbers[mask] != number or value in self.table.rows.get(mask, {}):
            return False
        self.levels |= index.level_bits(self._level[number], value.family)
        self.table.put(Ternary(value, mask), entry)
        return True

    def _reserve(self, number: int) -> None:
        """Have a number not be free."""
        if number < self._unused:
            self._free.remove(number)
        else:
            self._free += range(self._unused, number)
            self._unused = number + 1

    def change(
        self, changes: Iterable[tuple[Ternary, Entry | None]], generation: int, boot: int
    ) -> Writes:
        """Return the writes that make changes with the next generation.

        `boot`: as for `packed.pack_answer`.
        Raises: TooManyMasksError; nothing has changed then.
        """
        changes = [(match, entry) for match, entry in changes if self.table.get(match) != entry]
        writes = Writes(masks=self._admit(match.mask for match, entry in changes if entry))
        for match, entry in changes:
            key = self.key(match)
            old = self.table.get(match)
            before = packed.NOTHING if old is None else packed.pack_answer(old, boot)
            now = packed.NOTHING if entry is None else packed.pack_answer(entry, boot)
            raw = packed.pack_entry(key, generation + 1, now, before)
            writes.puts.append(raw)
            if entry is None:
                writes.deletes.append(key)
            elif old is None:
                number = self._numbers[match.mask]
                level = self._level[number]
                hash_ = packed.hash_of_entry(raw)
                writes.marks.append(
                    index.mark(self.table_id, number, level, match.value.daddr, hash_)
                )
                writes.levels |= index.level_bits(level, match.value.family)
            self.table.put(match, entry)
        self.levels |= writes.levels
        return writes

    def need(self, changes: Iterable[tuple[Ternary, Entry | None]], space: Space) -> Space:
        """Add to `space` what changes need."""
        new = [m for m, entry in changes if entry is not None and self.table.get(m) is None]
        levels = {mask: index.level_of(mask) for mask in {match.mask for match in new}}
        space.prefixes |= {(m.mask, index.prefix_of(m.value.daddr, levels[m.mask])) for m in new}
        space.entries += len(new)
        return space

    def forget(self, match: Ternary) -> None:
        """Take an entry for missing, because it is not in the maps as it should be."""
        self.table.put(match, None)

    def masks(self) -> dict[int, Key]:
        """Return the masks by number."""
        return self._mask.copy()

    def match_of(self, key: bytes) -> Ternary | None:
        """Return which flows the entry of a key matches, None if its mask is unknown."""
        _, number, value = layout.unpack_key(key)
        mask = self._mask.get(number)
        return None if mask is None else Ternary(value, mask)

    def level_of(self, number: int) -> int:
        """Return the level of a mask by its number; 0, which is always right, if there is none."""
        return self._level.get(number, 0)

    def _number(self, mask: Key, number: int) -> None:
        self._numbers[mask] = number
        self._mask[number] = mask
        self._level[number] = index.level_of(mask)

    def key_if_any(self, match: Ternary) -> bytes | None:
        """Return the key that an entry has or would have in the map, None if its mask is new."""
        return self.key(match) if match.mask in self._numbers else None

    def key(self, match: Ternary) -> bytes:
        """Return the key of an entry in the map."""
        return layout.pack_key(match.value, self.table_id, self._numbers[match.mask])

    def _admit(self, wanted: Iterable[Key]) -> list[tuple[int, Key]]:
        """Number the new masks, and return them.

        The masks that have no entry keep their numbers until numbers run out, so that an entry that
        comes and goes needs none each time.
        """
        wanted = dict.fromkeys(wanted)
        new = [mask for mask in wanted if mask not in self._numbers]
        left = len(self._free) + MASKS - self._unused
        if len(new) > left:
            unused = self._numbers.keys() - self.table.rows.keys() - wanted.keys()
            if len(new) > left + len(unused):
                count = len(self._numbers) - len(unused) + len(new)
                raise TooManyMasksError(count, MASKS)
            for mask in unused:
                number = self._numbers.pop(mask)
                del self._mask[number]
                self._free.append(number)
        for mask in new:
            self._number(mask, self._free.pop() if self._free else self._unused)
            self._unused = max(self._unused, self._numbers[mask] + 1)
        return [(self._numbers[mask], mask) for mask in new]
