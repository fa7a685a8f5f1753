"""Read the hooks' maps: settings, counters and published tables. Changes nothing.

Any root process may read them, whether a controller runs or not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from ipsecgate.core.tables import layout
from ipsecgate.core.tables.layout import INDEX, SETTING, Reason, Setting, TableId
from ipsecgate.core.tables.table import Table
from ipsecgate.edges.bpf import libbpf
from ipsecgate.edges.bpf.pins import Pins

EPOCH = {TableId.POLICY: Setting.POLICY_EPOCH, TableId.SPD: Setting.SPD_EPOCH}


def boot_time() -> int:
    """Return when CLOCK_BOOTTIME was 0, in nanoseconds of the wall clock as it is set now."""
    # Read this clock first: a pause before the second one then ends entries early, never late.
    since = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return time.time_ns() - since


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

    def table(self, which: TableId) -> Table | None:
        """Return a table as the hooks search it, None if it was never published."""
        epoch = self.setting(EPOCH[which])
        if not epoch:
            return None
        space = layout.space(which, epoch)
        raw = libbpf.lookup(self._fds["masks"], INDEX.pack(space), layout.MASKS_SIZE)
        entries = {}
        boot = boot_time()
        for key in list(libbpf.keys(self._fds["entries"], layout.KEY_SIZE)):
            if key[layout.SPACE_OFFSET] != space:
                continue
            value = libbpf.lookup(self._fds["entries"], key, layout.ENTRY_SIZE)
            if value is not None:
                index, masked = layout.unpack_key(key)
                entries[index, masked] = layout.unpack_entry(value, boot)
        return Table(layout.unpack_masks(raw or b""), entries)

    def entry_count(self) -> int:
        """Return how many entries the map holds, of both tables and of replaced ones."""
        return sum(1 for _ in libbpf.keys(self._fds["entries"], layout.KEY_SIZE))
