"""Read the hooks' maps: settings, counters and published tables. Changes nothing.

Any root process may read them, whether a controller runs or not.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from ipaddress import ip_network
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Self

from ipsecgate.core.model.flow import Flow, FlowPath, Origin
from ipsecgate.core.tables import layout, packed
from ipsecgate.core.tables.layout import INDEX, SETTING, Entry, Key, Reason, Setting, TableId
from ipsecgate.core.tables.table import Table, Ternary
from ipsecgate.edges.bpf import elements, libbpf
from ipsecgate.edges.bpf.nested import Nest
from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.edges.bpf.store import Stock

PUBLISHED = {TableId.POLICY: Setting.POLICY_PUBLISHED, TableId.SPD: Setting.SPD_PUBLISHED}


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
        self._nests = {
            name: Nest(self._fds[name], name, lambda: pins.objects.maps)
            for name in ("entries", "slots")
        }
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
        raw = elements.lookup(self._fds["settings"], INDEX.pack(which), SETTING.size)
        value: int = SETTING.unpack(raw or SETTING.pack(0))[0]
        return value

    def is_left(self, netns: int) -> bool:
        """Tell whether the flows of a network namespace are left to another instance."""
        return elements.lookup(self._fds["others"], SETTING.pack(netns), 1) is not None

    def path(self, flow: Flow) -> FlowPath | None:
        """Return where routing leads a flow, as the hooks know it; None: they don't."""
        mark = flow.mark & self.setting(Setting.MARKS)
        origin, host = Origin(flow.netns, flow.device, mark), ip_network(flow.daddr)
        raw = elements.lookup(self._fds["paths"], packed.pack_route(origin, host), packed.PATH_SIZE)
        return packed.unpack_path(raw, flow.daddr.version) if raw else None

    def refusals(self) -> list[tuple[Flow, Reason, float]]:
        """Return the flows refused most lately, why, and when last: wall clock, seconds.

        A refused call counts at most once in 100 ms; flows are without their source port.
        """
        began = time.time() - time.clock_gettime(time.CLOCK_MONOTONIC)
        found = []
        for key, raw in elements.items(self._fds["recent"], layout.KEY_SIZE, SETTING.size):
            refusal = packed.unpack_refusal(key)
            if refusal is not None:
                found.append((*refusal, began + SETTING.unpack(raw)[0] / layout.NS))
        return sorted(found, key=lambda one: one[2], reverse=True)

    def decisions(self) -> dict[Flow, Reason]:
        """Return the flows that a processor has let go in this generation of the tables, and why.

        Each processor remembers 4,096 at most.
        """
        generation = self.setting(Setting.GENERATION)
        size = packed.DECISION_SIZE * self._cpus
        found = {}
        for _, raw in elements.items(self._fds["decisions"], INDEX.size, size):
            for at in range(0, size, packed.DECISION_SIZE):
                one = packed.unpack_decision(raw[at : at + packed.DECISION_SIZE], generation)
                if one is not None:
                    found[one[0]] = one[1]
        return found

    def counters(self) -> Mapping[Reason, int]:
        """Return the count of each reason, summed over the CPUs."""
        size = SETTING.size * self._cpus
        totals = {}
        for reason in Reason:
            raw = elements.lookup(self._fds["counters"], INDEX.pack(reason), size) or bytes(size)
            totals[reason] = sum(value for (value,) in SETTING.iter_unpack(raw))
        return totals

    def table(self, table: TableId) -> Table | None:
        """Return a table as the hooks search it, None if none was ever published."""
        if not self.setting(PUBLISHED[table]):
            return None
        with self._stock() as stock:
            every = [one.raw for one in chain.from_iterable(stock.entries())]
        raw = [one for one in every if layout.unpack_key(packed.key_of_entry(one))[0] == table]
        masks, boot = self._masks(table, raw), boot_time()
        generation, found = self.setting(Setting.GENERATION), Table()
        for one in raw:
            _, number, flows = layout.unpack_key(packed.key_of_entry(one))
            entry = packed.unpack_answer(packed.unpack_entry(one, generation), boot)
            if entry is not None:
                found.put(Ternary(flows, masks[number]), entry)
        return found

    def entry(self, key: bytes) -> Entry | None:
        """Return what the entry of a packed key says now, None if there is none."""
        with self._stock() as stock:
            found = stock.find(key)
        if found is None:
            return None
        answer = packed.unpack_entry(found.raw, self.setting(Setting.GENERATION))
        return packed.unpack_answer(answer, boot_time())

    def _stock(self) -> closing[Stock]:
        """Open the entries, to read."""
        while True:
            used = self.setting(Setting.SLOTS)
            stock = Stock(self._nests["entries"], self._nests["slots"], used)
            if self.setting(Setting.SLOTS) == used:
                return closing(stock)
            stock.close()  # the controller has filled others meanwhile

    def _masks(self, table: TableId, entries: Iterable[bytes]) -> dict[int, Key]:
        """Return the masks that entries of a table have, by number."""
        numbers = {layout.unpack_key(packed.key_of_entry(raw))[1] for raw in entries}
        return {number: mask for number in numbers if (mask := self.mask(table, number))}

    def mask(self, table: TableId, number: int) -> Key | None:
        """Return the mask of a number, None if there is no such number."""
        if number >= layout.MASKS:
            return None
        index = INDEX.pack(table * layout.MASKS + number)
        raw = elements.lookup(self._fds["masks"], index, packed.MASK_SIZE)
        return packed.unpack_mask(raw) if raw else None

    def memory(self) -> int:
        """Return how many bytes of kernel memory the maps take. Source: proc(5), fdinfo."""
        total = sum(map(_memory, self._fds.values()))
        for name, at in (("entries", 0), ("slots", 0), ("slots", 1)):
            with libbpf.closing_fd(self._nests[name].take(at)) as inner:
                total += _memory(inner)
        return total

    def entry_count(self) -> int:
        """Return how many entries both tables have in the map."""
        with self._stock() as stock:
            return sum(len(some) for some in stock.entries())


def _memory(fd: int) -> int:
    found = re.search(r"^memlock:\s+(\d+)", fd_info(fd), re.MULTILINE)
    return int(found[1]) if found else 0
