"""Maps in a map: the hooks find `entries` and `slots` there, so that larger ones can replace them.

A hook that has found the old map goes on with it; the kernel frees it when no hook has it any more.
Putting a map in waits until no hook can find the old one, which takes some milliseconds.
"""

from __future__ import annotations

from dataclasses import replace
from errno import ENOENT

from ipsecgate.core.tables.layout import INDEX
from ipsecgate.edges.bpf import elements, libbpf
from ipsecgate.edges.bpf.libbpf import MapShape, closing_fd


def create(name: str, shape: MapShape) -> int:
    """Create a map, and the smallest maps in it. Raises: OSError."""
    if shape.inner is None:
        return libbpf.create_map(name, shape)
    with closing_fd(libbpf.create_map(name, shape.inner)) as model:
        outer = libbpf.create_map(name, shape, model)
    for at in range(shape.max_entries):
        with closing_fd(libbpf.create_map(name, shape.inner)) as inner:
            put(outer, at, inner)
    return outer


def put(outer: int, at: int, inner: int) -> None:
    """Put a map in. Raises: OSError."""
    elements.update(outer, INDEX.pack(at), INDEX.pack(inner))


def take(outer: int, at: int) -> int:
    """Open the map that is there. Raises: OSError."""
    raw = elements.lookup(outer, INDEX.pack(at), INDEX.size)
    if raw is None:
        raise OSError(ENOENT, "no map in a map")
    return libbpf.open_map_id(INDEX.unpack(raw)[0])


def wait(outer: int, at: int) -> None:
    """Wait until every hook that runs now has ended. Raises: OSError."""
    with closing_fd(take(outer, at)) as inner:
        put(outer, at, inner)


def larger(inner: int, name: str, count: int) -> int:
    """Create a map like another, for so many elements. Raises: OSError."""
    return libbpf.create_map(name, replace(libbpf.map_shape(inner), max_entries=count))
