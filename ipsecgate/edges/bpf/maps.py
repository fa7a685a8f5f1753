"""Read the hooks' maps: settings, counters and published tables. Changes nothing.

Any root process may read them, whether a controller runs or not.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Self

from ipsecgate.core.tables import layout
from ipsecgate.core.tables.layout import INDEX, SETTING, Key, Reason, Setting, TableId
from ipsecgate.core.tables.table import Table, Ternary
from ipsecgate.edges.bpf import libbpf
from ipsecgate.edges.bpf.pins import Pins

LIST = {TableId.POLICY: Setting.POLICY_LIST, TableId.SPD: Setting.SPD_LIST}


def boot_time() -> int:
    """Return when CLOCK_BOOTTIME was 0, in nanoseconds of the wall clock as it is set now."""
    # Read this clock first: a pause before the second one then ends entries early, never late.
    since = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return time.time_ns() - since


def fd_info(fd: int) -> str:
    """Return what the kernel says of a descriptor of ours."""
    return Path(f"/proc/self/fdinfo/{fd}").read_text()


class Maps:
    """The maps of one loaded instance, kept open."""

    def __init__(self, pins: Pins) -> None:
        """Open every map. Raises: OSError if one does not exist."""
        self._fds = {name: pins.objects.open_map(name) for name in layout.MAPS}
        self._cpus = libbpf.possible_cpus()

    def close(self) -> None:
        """Close every descriptor; pins and links stay, and the hooks keep refusing."""
        for fd in self._fds.values():
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def setting(self, which: Setting) -> int:
        """Return one word of the settings map."""
        raw = libbpf.lookup(self._fds["settings"], INDEX.pack(which), SETTING.size)
        value: int = SETTING.unpack(raw or SETTING.pack(0))[0]
        return value

    def counters(self) -> Mapping[Reason, int]:
        """Return the count of each reason, summed over the CPUs."""
        size = SETTING.size * self._cpus
        totals = {}
        for reason in Reason:
            raw = libbpf.lookup(self._fds["counters"], INDEX.pack(reason), size) or bytes(size)
            totals[reason] = sum(value for (value,) in SETTING.iter_unpack(raw))
        return totals

    def table(self, table: TableId) -> Table | None:
        """Return a table as the hooks search it, None if none was ever published."""
        if not self.setting(LIST[table]):
            return None
        masks, boot = self._masks(table), boot_time()
        generation, found = self.setting(Setting.GENERATION), Table()
        for raw, value in chain.from_iterable(self._raw_entries(table)):
            _, number, key = layout.unpack_key(raw)
            entry = layout.unpack_answer(layout.unpack_entry(value, generation), boot)
            if number in masks and entry is not None:
                found.put(Ternary(key, masks[number][0]), entry)
        return found

    def _masks(self, table: TableId) -> dict[int, tuple[Key, int]]:
        return layout.unpack_masks(self._mask_parts(table))

    def _mask_parts(self, table: TableId) -> list[bytes]:
        """Return the list of masks in use, up to the part in which it ends."""
        parts: list[bytes] = []
        number = self.setting(LIST[table])
        for at in range(layout.PARTS if number else 0):
            index = INDEX.pack((table * 2 + number % 2) * layout.PARTS + at)
            parts.append(libbpf.lookup(self._fds["masks"], index, layout.PART_SIZE) or b"")
            if len(layout.unpack_masks(parts)) < len(parts) * layout.PART:
                break
        return parts

    def _raw_entries(self, table: TableId) -> Iterator[list[tuple[bytes, bytes]]]:
        """Yield the keys and values of a table's entries, a batch at a time."""
        entries = self._fds["entries"]
        for chunk in libbpf.items(entries, layout.KEY_SIZE, layout.ENTRY_SIZE):
            yield [item for item in chunk if layout.unpack_key(item[0])[0] == table]

    def memory(self) -> int:
        """Return how many bytes of kernel memory the maps take. Source: proc(5), fdinfo."""
        total = 0
        for fd in self._fds.values():
            found = re.search(r"^memlock:\s+(\d+)", fd_info(fd), re.MULTILINE)
            total += int(found[1]) if found else 0
        return total

    def entry_count(self) -> int:
        """Return how many entries both tables have in the map."""
        items = libbpf.items(self._fds["entries"], layout.KEY_SIZE, layout.ENTRY_SIZE)
        return sum(len(chunk) for chunk in items)
