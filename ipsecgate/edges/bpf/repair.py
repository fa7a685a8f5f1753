"""Compare a table with what was published, and restore it: somebody else may have changed it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ipsecgate.core.tables import layout, packed
from ipsecgate.core.tables.layout import Entry, Key, Setting, TableId
from ipsecgate.core.tables.table import Table, Ternary
from ipsecgate.edges.bpf.maps import boot_time
from ipsecgate.edges.bpf.parts import drop, let_others_run, parts_of
from ipsecgate.edges.bpf.store import Stored
from ipsecgate.edges.bpf.tables import LEVELS, Tables, answer_of


@dataclass
class _Found:
    """What a comparison of a table has found."""

    right: set[Ternary] = field(default_factory=set)
    wrong: dict[Ternary, Entry | None] = field(default_factory=dict)  # or missing, as it should be
    strange: list[Stored] = field(default_factory=list)  # to be removed
    marked: bool = True  # whether the index knows those that are right

    @property
    def strange_keys(self) -> set[bytes]:
        return {packed.key_of_entry(one.raw) for one in self.strange}


class Repair:
    """One comparison of a published table with its content.

    Other tasks run meanwhile. It is outdated as soon as one of them changes a table.
    """

    def __init__(self, tables: Tables, table: TableId, content: Table) -> None:
        self._tables = tables
        self._table = table
        self._content = content
        self._generation = tables.setting(Setting.GENERATION)
        self._found = _Found()

    async def run(self) -> int:
        """Restore the content; return how much of it was not right. Raises: OSError."""
        try:
            return await self._restore() if await self._compare_all() else 0
        finally:
            await drop(self._found.right)

    async def _restore(self) -> int:
        tables, image, found = self._tables, self._tables.images[self._table], self._found
        lost = [
            (number, mask)
            for number, mask in image.masks().items()
            if tables.mask(self._table, number) != mask
        ]
        levels = tables.setting(LEVELS[self._table]) & image.levels == image.levels
        if not (found.wrong or found.strange or lost) and found.marked and levels:
            return 0
        async with tables.writing:
            await self._write(lost)
        strange = found.strange_keys - {
            image.key(match) for match, entry in found.wrong.items() if entry is not None
        }
        marks = (not found.marked) + (not levels)
        return len(lost) + len(found.wrong) + len(strange) + marks

    async def _write(self, lost: Iterable[tuple[int, Key]]) -> None:
        tables, image = self._tables, self._tables.images[self._table]
        await tables.store.count(let_others_run)  # somebody else may have written entries
        for one in self._found.strange:
            tables.store.forget(one.place)
        for match in self._found.wrong:
            image.forget(match)
        for number, mask in lost:
            tables.set_mask(self._table, number, mask)
        tables.set(LEVELS[self._table], image.levels)
        await tables.restore(self._table, self._found.wrong.items())
        await tables.store.fill(let_others_run)

    async def _compare_all(self) -> bool:
        """Compare all entries; return False if that is outdated."""
        masks = self._tables.images[self._table].masks()
        for part in self._tables.store.entries():
            self._compare(part, masks)
            await let_others_run()
            if self._is_outdated():
                return False
        if len(self._found.right) < self._content.size:
            for entries in parts_of(self._content.entries()):
                right = self._found.right
                self._found.wrong.update(one for one in entries if one[0] not in right)
                await let_others_run()
                if self._is_outdated():
                    return False
        return True

    def _is_outdated(self) -> bool:
        tables = self._tables
        return tables.writing.locked() or tables.setting(Setting.GENERATION) != self._generation

    def _compare(self, part: Iterable[Stored], masks: Mapping[int, Key]) -> None:
        boot, found = boot_time(), self._found
        for one in part:
            table, number, flows = layout.unpack_key(packed.key_of_entry(one.raw))
            if table != self._table:
                continue
            mask = masks.get(number)
            match = None if mask is None else Ternary(flows, mask)
            wanted = None if match is None else self._content.get(match)
            if match is None or wanted is None or match in found.right:
                found.strange.append(one)
            elif not packed.is_sound(one.raw, self._generation) or (
                answer_of(one.raw, self._generation, boot) != wanted
            ):
                found.strange.append(one)
                found.wrong[match] = wanted
            else:
                found.right.add(match)
                found.marked &= self._tables.store.is_marked(one.raw)
