"""The maps and programs of one version, pinned in one folder.

    <folder>/maps/<map>
            /progs/<hook>

Two versions may lie side by side while one replaces the other (`pins`). Which one made a
folder its settings tell, in the one word that never moves: GATE_VERSION.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ipsecgate.core.tables.layout import INDEX, LAYOUT, MAPS, SETTING, Setting
from ipsecgate.edges.bpf import libbpf
from ipsecgate.edges.bpf.bytecode import Bytecode

KINDS = ("progs", "maps")


class Hook(NamedTuple):
    """A program's type and where it is attached: BPF_PROG_TYPE_*, BPF_CGROUP_* of linux/bpf.h."""

    prog_type: int
    attach_type: int


HOOKS = {
    "connect4": Hook(libbpf.PROG_TYPE_CGROUP_SOCK_ADDR, 10),
    "connect6": Hook(libbpf.PROG_TYPE_CGROUP_SOCK_ADDR, 11),
    "sendmsg4": Hook(libbpf.PROG_TYPE_CGROUP_SOCK_ADDR, 14),
    "sendmsg6": Hook(libbpf.PROG_TYPE_CGROUP_SOCK_ADDR, 15),
    "egress": Hook(libbpf.PROG_TYPE_CGROUP_SKB, 1),
}


@contextmanager
def opened(fd: int) -> Iterator[int]:
    """Close a descriptor when the block ends."""
    try:
        yield fd
    finally:
        os.close(fd)


class Objects:
    """What is pinned in a folder, if anything is. Holds no descriptors of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def any(self) -> bool:
        """Tell whether something is there, whole or not."""
        return any((self.folder / kind).is_dir() for kind in KINDS)

    @property
    def whole(self) -> bool:
        """Tell whether every map and program of this version is there."""
        maps = all((self.folder / "maps" / name).exists() for name in MAPS)
        return maps and self.hooks() >= HOOKS.keys()

    def hooks(self) -> set[str]:
        """Return the hooks that have a program here."""
        folder = self.folder / "progs"
        return {path.name for path in folder.iterdir()} if folder.is_dir() else set()

    def open_map(self, name: str) -> int:
        """Open a pinned map. Raises: OSError."""
        return libbpf.open_pin(self.folder / "maps" / name)

    def open_program(self, hook: str) -> int:
        """Open a pinned program. Raises: OSError."""
        return libbpf.open_pin(self.folder / "progs" / hook)

    def fit(self, bytecode: Bytecode) -> bool:
        """Tell whether the maps that are here are this version's."""
        for name, shape in bytecode.maps.items():
            if (self.folder / "maps" / name).exists():
                with opened(self.open_map(name)) as fd:
                    if libbpf.map_shape(fd) != shape:
                        return False
        return self._version() in (0, LAYOUT)

    def _version(self) -> int:
        if not (self.folder / "maps" / "settings").exists():
            return 0
        with opened(self.open_map("settings")) as fd:
            raw = libbpf.lookup(fd, INDEX.pack(Setting.VERSION), SETTING.size)
        return int(SETTING.unpack(raw)[0]) if raw else -1

    def make(self, bytecode: Bytecode) -> None:
        """Pin this version: maps that are here are taken over, programs replaced.

        New maps refuse whatever is not exempt until tables are published. Raises: OSError.
        """
        for kind in KINDS:
            (self.folder / kind).mkdir(mode=0o700, parents=True, exist_ok=True)
        fds = {}
        try:
            for name, shape in bytecode.maps.items():
                fds[name] = self._map(name, shape)
            version = INDEX.pack(Setting.VERSION), SETTING.pack(LAYOUT)
            libbpf.update(fds["settings"], *version)
            for hook, (prog_type, attach_type) in HOOKS.items():
                code = bytecode.programs[hook].linked(fds)
                with opened(libbpf.load_program(hook, code, prog_type, attach_type)) as prog:
                    path = self.folder / "progs" / hook
                    path.unlink(missing_ok=True)  # the links hold their own reference
                    libbpf.pin(prog, path)
        finally:
            for fd in fds.values():
                os.close(fd)

    def _map(self, name: str, shape: libbpf.MapShape) -> int:
        path = self.folder / "maps" / name
        if path.exists():
            return libbpf.open_pin(path)
        fd = libbpf.create_map(name, shape)
        try:
            libbpf.pin(fd, path)
        except OSError:
            os.close(fd)
            raise
        return fd

    def remove(self) -> None:
        """Remove every pin; what links still hold stays in force."""
        for kind in KINDS:
            for path in sorted((self.folder / kind).glob("*")):
                path.unlink()
            with suppress(FileNotFoundError):
                (self.folder / kind).rmdir()
        with suppress(OSError):
            self.folder.rmdir()  # unless it has more than these
