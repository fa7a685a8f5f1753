"""Maps in a map: the hooks find `entries` and `slots` there, so that larger ones can replace them.

    <folder>/maps/<name>         the outer map
                  <name>-<at>    what is in it: only a privileged process may open a map by its id

A hook that has found the old map goes on with it; the kernel frees it when no hook has it any more.
Putting a map in waits until no hook can find the old one, which takes some milliseconds.

Rules of this module: a map is pinned before it is put in. If a writer dies in between, `settle` of
its successor puts it in.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ipsecgate.core.tables.layout import INDEX
from ipsecgate.edges.bpf import elements, libbpf
from ipsecgate.edges.bpf.libbpf import MapShape, closing_fd

Folder = Callable[[], Path]
"""Returns where the pins are: another version may move them while they are in use."""


def create(name: str, shape: MapShape, folder: Path | None = None) -> int:
    """Create a map, and the smallest maps in it; pin these in a folder. Raises: OSError."""
    if shape.inner is None:
        return libbpf.create_map(name, shape)
    with closing_fd(libbpf.create_map(name, shape.inner)) as model:
        outer = libbpf.create_map(name, shape, model)
    for at in range(shape.max_entries):
        with closing_fd(libbpf.create_map(name, shape.inner)) as inner:
            if folder is not None:
                _pin(inner, path(folder, name, at))
            _put(outer, at, inner)
    return outer


def path(folder: Path, name: str, at: int) -> Path:
    """Return where a map in a map is pinned."""
    return folder / f"{name}-{at}"


def larger(inner: int, name: str, count: int) -> int:
    """Create a map like another, for so many elements. Raises: OSError."""
    return libbpf.create_map(name, replace(libbpf.map_shape(inner), max_entries=count))


class Nest:
    """The maps in a map; `outer` is its descriptor."""

    def __init__(self, outer: int, name: str, folder: Folder) -> None:
        self.name = name
        self._outer = outer
        self._folder = folder

    def take(self, at: int) -> int:
        """Open the map that is there. Raises: OSError."""
        return libbpf.open_pin(path(self._folder(), self.name, at))

    def put(self, at: int, inner: int) -> None:
        """Put a map in, instead of the one that is there. Raises: OSError."""
        _pin(inner, path(self._folder(), self.name, at))
        _put(self._outer, at, inner)

    def wait(self, at: int) -> None:
        """Wait until every hook that runs now has ended. Raises: OSError."""
        with closing_fd(self.take(at)) as inner:
            _put(self._outer, at, inner)

    def settle(self, at: int) -> None:
        """Put in what a writer has pinned who died before putting it in. Raises: OSError."""
        with closing_fd(self.take(at)) as inner:
            there = elements.lookup(self._outer, INDEX.pack(at), INDEX.size)
            if there != INDEX.pack(libbpf.map_id(inner)):
                _put(self._outer, at, inner)


def _put(outer: int, at: int, inner: int) -> None:
    elements.update(outer, INDEX.pack(at), INDEX.pack(inner))


def _pin(inner: int, where: Path) -> None:
    """Pin a map, in place of the one that is pinned there."""
    aside = where.with_name(f"{where.name}-new")  # bpffs allows no dot in a name
    with suppress(FileNotFoundError):
        aside.unlink()
    libbpf.pin(inner, aside)
    aside.rename(where)
