"""What one table looks like in the hooks' maps, and the writes that change it.

A change is written with the next generation and is in force when that begins (`GATE_GENERATION`):
until then the hooks take from each entry what it said before. So a change of many entries takes
effect at once, and a writer that dies in the middle of it has changed nothing.

Rules of this module: bytes out, no map. The caller sets the bits for `hashes`, writes `puts` and
a new list of masks, then begins the generation, and deletes last.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ipsecgate.core.tables import layout
from ipsecgate.core.tables.layout import MASKS, Entry, Key, TableId, TooManyMasksError
from ipsecgate.core.tables.table import Table, Ternary


@dataclass
class Writes:
    """What to write: entries by key, what to put back if that fails, a new list of masks."""

    puts: list[tuple[bytes, bytes]] = field(default_factory=list)
    undo: list[tuple[bytes, bytes | None]] = field(default_factory=list)
    deletes: list[bytes] = field(default_factory=list)
    masks: bool = False  # the list of masks must be written again
    hashes: list[int] = field(default_factory=list)  # of new keys, for the filter

    def add(self, other: Writes) -> None:
        """Take in the writes of another change that begins with the same generation."""
        self.puts += other.puts
        self.undo += other.undo
        self.deletes += other.deletes
        self.masks = self.masks or other.masks
        self.hashes += other.hashes


class TableImage:
    """The entries of a table as the maps have them, and the number of each mask."""

    def __init__(self, table_id: TableId) -> None:
        self.table_id = table_id
        self.table = Table()
        self._numbers: dict[Key, int] = {}
        self._best: dict[Key, int] = {}  # no entry of the mask has a lower rank
        self._unused = 0  # no mask has had this number, or a higher one
        self._free: list[int] = []  # lower ones that are free

    @classmethod
    def read(
        cls, table_id: TableId, masks: Mapping[int, tuple[Key, int]], entries: Mapping[bytes, Entry]
    ) -> tuple[TableImage, list[bytes]]:
        """Return the image of a table that is in the maps, and the keys that do not belong to it.

        `masks`: the list that the hooks search, as `layout.unpack_masks` returns it.
        """
        image, strange = cls(table_id), []
        image._numbers = {mask: number for number, (mask, _) in masks.items()}
        image._best = dict(masks.values())
        image._unused = max(masks, default=-1) + 1
        image._free = [n for n in range(image._unused - 1, -1, -1) if n not in masks]
        for raw, entry in entries.items():
            _, number, value = layout.unpack_key(raw)
            mask, best = masks.get(number, (None, 0))
            if mask is None or value.masked(mask) != value or entry.rank < best:
                strange.append(raw)
            else:
                image.table.put(Ternary(value, mask), entry)
        return image, strange

    def change(
        self, changes: Iterable[tuple[Ternary, Entry | None]], generation: int, boot: int
    ) -> Writes:
        """Return the writes that make changes with the next generation.

        `boot`: as for `layout.pack_answer`.
        Raises: TooManyMasksError if there are too many masks; nothing has changed then.
        """
        changes = [(match, entry) for match, entry in changes if self.table.get(match) != entry]
        writes = Writes()
        writes.masks = self._admit(
            (match.mask, entry.rank) for match, entry in changes if entry is not None
        )
        for match, entry in changes:
            raw = self.key(match)
            hashed = layout.key_hash(raw)
            old = self.table.get(match)
            before = layout.NOTHING if old is None else layout.pack_answer(old, boot)
            now = layout.NOTHING if entry is None else layout.pack_answer(entry, boot)
            put = layout.pack_hashed_entry(hashed, generation + 1, now, before)
            writes.puts.append((raw, put))
            again = None if old is None else layout.pack_hashed_entry(hashed, 0, before)
            writes.undo.append((raw, again))
            if entry is None:
                writes.deletes.append(raw)
            elif old is None:
                writes.hashes.append(hashed)
            self.table.put(match, entry)
        return writes

    def listed(self) -> dict[int, tuple[Key, int]]:
        """Return the masks and their best ranks, by number."""
        return {number: (mask, self._best[mask]) for mask, number in self._numbers.items()}

    def forget(self, match: Ternary) -> None:
        """Take an entry for missing, because it is not in the maps as it should be."""
        self.table.put(match, None)

    def masks(self) -> list[bytes]:
        """Return the list of masks as bytes, in parts."""
        return layout.pack_masks(((n, *one) for n, one in self.listed().items()), self.table_id)

    def hashes(self) -> Iterator[int]:
        """Yield the hashes of all entries' keys, for the filter."""
        return (layout.key_hash(self.key(match)) for match, _ in self.table.entries())

    def key(self, match: Ternary) -> bytes:
        """Return the key of an entry in the map."""
        return layout.pack_key(match.value, self.table_id, self._numbers[match.mask])

    def _admit(self, wanted: Iterable[tuple[Key, int]]) -> bool:
        """Number the new masks; return whether the list of masks must be written again."""
        best: dict[Key, int] = {}
        for mask, rank in wanted:
            best[mask] = min(best.get(mask, rank), rank)
        if len(best.keys() - self._numbers.keys()) > self._numbers_left:
            self._retire()
        new = best.keys() - self._numbers.keys()
        if len(new) > self._numbers_left:
            raise TooManyMasksError(len(self._numbers) + len(new), MASKS)
        lower = {mask for mask in best if best[mask] < self._best.get(mask, best[mask] + 1)}
        for mask in new:
            if self._free:
                self._numbers[mask] = self._free.pop()
            else:
                self._numbers[mask], self._unused = self._unused, self._unused + 1
        for mask in lower:
            self._best[mask] = best[mask]
        return bool(lower)

    @property
    def _numbers_left(self) -> int:
        return len(self._free) + MASKS - self._unused

    def _retire(self) -> None:
        """Free the numbers of the masks that have no entry.

        Such masks stay listed until numbers run out, so that an entry that comes and goes does not
        have the list written each time.
        """
        for mask in self._numbers.keys() - self.table.rows.keys():
            self._free.append(self._numbers.pop(mask))
            del self._best[mask]
