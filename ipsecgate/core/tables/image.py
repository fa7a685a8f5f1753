"""What one table looks like in the hooks' maps, and the writes that change it.

A change is written with the next generation and is in force when that begins (`GATE_GENERATION`):
until then the hooks take from each entry what it said before. So a change of many entries takes
effect at once, and a writer that dies in the middle of it has changed nothing.

Rules of this module: bytes out, no map. The caller writes `marks`, `levels`, `masks` and `puts`,
then begins the generation, and deletes last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
        self._numbers: dict[Key, int] = {}
        self._level: dict[int, int] = {}  # of a mask, by its number
        self._unused = 0  # no mask has had this number, or a higher one
        self._free: list[int] = []  # lower ones that are free

    @classmethod
    def read(
        cls, table_id: TableId, masks: Mapping[int, Key], entries: Mapping[bytes, Entry]
    ) -> tuple[TableImage, list[bytes]]:
        """Return the image of a table that is in the maps, and the keys that do not belong to it.

        `masks`: those that the entries' keys name, by number.
        """
        image, strange = cls(table_id), []
        for raw, entry in entries.items():
            _, number, value = layout.unpack_key(raw)
            mask = masks.get(number)
            if mask is None or value.masked(mask) != value or image._taken(mask, number):
                strange.append(raw)
            else:
                image._number(mask, number)
                image.table.put(Ternary(value, mask), entry)
        used = set(image._numbers.values())
        image._unused = max(used, default=-1) + 1
        image._free = [number for number in range(image._unused) if number not in used]
        return image, strange

    def _taken(self, mask: Key, number: int) -> bool:
        """Return whether a mask has another number already."""
        return self._numbers.get(mask, number) != number

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
        return {number: mask for mask, number in self._numbers.items()}

    def levels(self) -> int:
        """Return the levels of all entries, as in GATE_LEVELS."""
        found = 0
        for mask, row in self.table.rows.items():
            for family in {value.family for value in row}:
                found |= index.level_bits(index.level_of(mask), family)
        return found

    def level_of(self, number: int) -> int:
        """Return the level of a mask by its number; 0, which is always right, if there is none."""
        return self._level.get(number, 0)

    def _number(self, mask: Key, number: int) -> None:
        self._numbers[mask] = number
        self._level[number] = index.level_of(mask)

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
            self._free += [self._numbers.pop(mask) for mask in unused]
        for mask in new:
            self._number(mask, self._free.pop() if self._free else self._unused)
            self._unused = max(self._unused, self._numbers[mask] + 1)
        return [(self._numbers[mask], mask) for mask in new]
