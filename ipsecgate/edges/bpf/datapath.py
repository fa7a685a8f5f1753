"""Write what the hooks search, and receive their refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ipsecgate.core.model.events import FlowRefused
from ipsecgate.core.model.flow import FlowPath, Network, Origin
from ipsecgate.core.tables import layout, packed
from ipsecgate.core.tables.layout import INDEX, TableId
from ipsecgate.core.tables.table import Table
from ipsecgate.edges.bpf import elements
from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.edges.bpf.repair import Repair
from ipsecgate.edges.bpf.ring import Ring
from ipsecgate.edges.bpf.tables import Tables


class Datapath(Tables):
    """The maps of one loaded instance, kept open by its only controller."""

    def __init__(self, pins: Pins) -> None:
        """Open every map. Raises: OSError."""
        super().__init__(pins)
        self._paths = self._read_paths()  # as written; a predecessor's are written again
        self._ring: Ring | None = None

    def close(self) -> None:
        """Close every descriptor; pins and links stay, and the hooks keep refusing."""
        if self._ring is not None:
            self._ring.close()
        super().close()

    async def repair(self, table: TableId, content: Table) -> int:
        """Restore a published table to this content; return how much of it was not right.

        Other tasks run meanwhile. It stops early if one of them changes a table.
        Raises: OSError.
        """
        return await Repair(self, table, content).run()

    # --- paths --------------------------------------------------------------------

    @property
    def origins(self) -> list[Origin]:
        """Return the origins whose paths the hooks know, perhaps from a predecessor."""
        return list(self._paths)

    def set_paths(self, origin: Origin, paths: Iterable[tuple[Network, FlowPath]]) -> None:
        """Write where routing leads the flows of an origin, by destination; none: forget it.

        Only differences are written. Raises: OSError.
        """
        fd, before = self._fds["paths"], self._paths.get(origin, {})
        # Longest prefix first: otherwise a lookup could match a wider network while the narrower
        # one that is right is not written yet.
        ordered = sorted(paths, key=lambda pair: -pair[0].prefixlen)
        wanted = {packed.pack_route(origin, net): packed.pack_path(path) for net, path in ordered}
        others = sum(map(len, self._paths.values())) - len(before)
        if others + len(before.keys() | wanted.keys()) > layout.ROUTES:
            self._delete_paths(before)  # make space; meanwhile these flows are refused
            before = {}
        for key, value in wanted.items():
            if before.get(key) != value:
                elements.update(fd, key, value)
        self._delete_paths(before.keys() - wanted.keys())
        self._paths[origin] = wanted
        if not wanted:
            del self._paths[origin]
        self.raise_generation()

    def set_tunnels(self, indexes: Iterable[int]) -> None:
        """Write the devices that the backstop lets packets into. Raises: OSError."""
        fd, wanted = self._fds["tunnels"], set(map(INDEX.pack, indexes))
        for key in [key for key in elements.keys(fd, INDEX.size) if key not in wanted]:
            elements.delete(fd, key)
        for key in wanted:
            elements.update(fd, key, b"\1")

    def _delete_paths(self, routes: Iterable[bytes]) -> None:
        """Delete paths, shortest prefix first, so that none matches for a deleted longer one."""
        for key in sorted(routes, key=INDEX.unpack_from):
            elements.delete(self._fds["paths"], key)

    def _read_paths(self) -> dict[Origin, dict[bytes, bytes]]:
        """Return the routes in the map, by origin, with empty values: each is written again."""
        found: dict[Origin, dict[bytes, bytes]] = {}
        for key in elements.keys(self._fds["paths"], packed.ROUTE_SIZE):
            found.setdefault(packed.origin_of_route(key), {})[key] = b""
        return found

    # --- refusals -------------------------------------------------------------------

    def open_ring(self, on_refusal: Callable[[FlowRefused], None]) -> int:
        """Start to read refusals; return a descriptor to poll.

        Call `drain` when it is readable. Two readers would each miss the other's records, so an
        instance has one controller. Raises: OSError.
        """

        def on_record(record: bytes) -> None:
            on_refusal(packed.unpack_event(record))

        self._ring = Ring(self._fds["events"], on_record)
        return self._ring.fd

    def drain(self) -> None:
        """Pass waiting refusals, a bounded number of them, to the callback of `open_ring`.

        Raises: OSError; LayoutError for a record that no hook can have written.
        """
        if self._ring is not None:
            self._ring.consume()
