"""The maps and programs of one version, pinned in one folder.

    <folder>/maps/<map>
            /progs/<hook>

Two versions may exist side by side while one replaces the other (`pins`). A folder's version is in
its settings map, at GATE_VERSION, the one word that no layout ever moves.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ipsecgate.core.tables.layout import INDEX, LAYOUT, MAPS, SETTING, Setting
from ipsecgate.edges.bpf import elements, libbpf, nested
from ipsecgate.edges.bpf.libbpf import closing_fd

if TYPE_CHECKING:
    from ipsecgate.edges.bpf.bytecode import Bytecode, Program

KINDS = ("progs", "maps")


class Hook(NamedTuple):
    """A program's type and attach point: BPF_PROG_TYPE_* and BPF_CGROUP_* in linux/bpf.h."""

    prog_type: int
    attach_type: int


HOOKS = {
    "connect4": Hook(libbpf.PROG_TYPE_CGROUP_SOCK_ADDR, 10),
    "connect6": Hook(libbpf.PROG_TYPE_CGROUP_SOCK_ADDR, 11),
    "sendmsg4": Hook(libbpf.PROG_TYPE_CGROUP_SOCK_ADDR, 14),
    "sendmsg6": Hook(libbpf.PROG_TYPE_CGROUP_SOCK_ADDR, 15),
    "egress": Hook(libbpf.PROG_TYPE_CGROUP_SKB, 1),
}


def _name(hook: str, program: Program) -> str:
    """Return the kernel's name for a program, at most 15 characters, by which it is known again."""
    return f"{hook}_{program.digest}"


class Objects:
    """The pins in a folder, which may be missing. Keeps no descriptors open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.maps = folder / "maps"

    @property
    def exists(self) -> bool:
        """Whether the folder has pins, complete or not."""
        return any((self.folder / kind).is_dir() for kind in KINDS)

    @property
    def is_complete(self) -> bool:
        """Whether every map and program of this version is pinned."""
        maps = all((self.maps / name).exists() for name in MAPS)
        return maps and self.hooks() >= HOOKS.keys()

    def hooks(self) -> set[str]:
        """Return the hooks whose program is pinned here."""
        folder = self.folder / "progs"
        return {path.name for path in folder.iterdir()} if folder.is_dir() else set()

    def open_map(self, name: str) -> int:
        """Open a pinned map. Raises: OSError."""
        return libbpf.open_pin(self.maps / name)

    def open_program(self, hook: str) -> int:
        """Open a pinned program. Raises: OSError."""
        return libbpf.open_pin(self.folder / "progs" / hook)

    def fits(self, bytecode: Bytecode) -> bool:
        """Return whether this version can use the maps that are pinned here. Raises: OSError."""
        for name, shape in bytecode.maps.items():
            if (self.maps / name).exists():
                with closing_fd(self.open_map(name)) as fd:
                    if libbpf.map_shape(fd) != replace(shape, inner=None):
                        return False
                places = range(shape.max_entries if shape.inner is not None else 0)
                if not all(nested.path(self.maps, name, at).exists() for at in places):
                    return False
        return self._version() in (0, LAYOUT)

    def _version(self) -> int:
        if not (self.maps / "settings").exists():
            return 0
        with closing_fd(self.open_map("settings")) as fd:
            raw = elements.lookup(fd, INDEX.pack(Setting.VERSION), SETTING.size)
        return int(SETTING.unpack(raw)[0]) if raw else -1

    def pin(self, bytecode: Bytecode, *, audit: bool = False) -> None:
        """Pin this version: reuse existing maps, and those programs that are the same.

        With new maps the hooks refuse every flow that is not exempt until tables are published, or
        with `audit` only count it. The kernel's verifier may take a second for a program.
        Raises: OSError.
        """
        for kind in KINDS:
            (self.folder / kind).mkdir(mode=0o700, parents=True, exist_ok=True)
        fds = {}
        try:
            for name, shape in bytecode.maps.items():
                fds[name] = self._map(name, shape)
            if self._version() == 0:  # else the controller decides
                mode = INDEX.pack(Setting.AUDIT), SETTING.pack(int(audit))
                elements.update(fds["settings"], *mode)
            version = INDEX.pack(Setting.VERSION), SETTING.pack(LAYOUT)
            elements.update(fds["settings"], *version)
            for hook in HOOKS:
                if not self._has(hook, bytecode.programs[hook], fds):
                    self._load(hook, bytecode.programs[hook], fds)
        finally:
            for fd in fds.values():
                os.close(fd)

    def _has(self, hook: str, program: Program, fds: Mapping[str, int]) -> bool:
        """Return whether this program is pinned, and uses these maps."""
        try:
            with closing_fd(self.open_program(hook)) as fd:
                name, maps = libbpf.program_info(fd)
        except FileNotFoundError:
            return False
        wanted = {libbpf.map_id(fds[used]) for used in program.maps.values()}
        return name == _name(hook, program) and maps == wanted

    def differing(self, bytecode: Bytecode) -> set[str]:
        """Return the hooks whose pinned program is another than this version's. Raises: OSError."""
        found = set()
        for hook in HOOKS:
            with closing_fd(self.open_program(hook)) as fd:
                name, _maps = libbpf.program_info(fd)
            if name != _name(hook, bytecode.programs[hook]):
                found.add(hook)
        return found

    def _load(self, hook: str, program: Program, fds: Mapping[str, int]) -> None:
        with closing_fd(
            libbpf.load_program(
                _name(hook, program), program.linked(fds), *HOOKS[hook], program.functions
            )
        ) as prog:
            path = self.folder / "progs" / hook
            path.unlink(missing_ok=True)  # the links hold their own reference
            libbpf.pin(prog, path)

    def _map(self, name: str, shape: libbpf.MapShape) -> int:
        path = self.maps / name
        if path.exists():
            return libbpf.open_pin(path)
        fd = nested.create(name, shape, self.maps)
        try:
            libbpf.pin(fd, path)
        except OSError:
            os.close(fd)
            raise
        return fd

    def remove(self) -> None:
        """Remove every pin; programs that links still hold stay in force."""
        for kind in KINDS:
            for path in sorted((self.folder / kind).glob("*")):
                path.unlink()
            with suppress(FileNotFoundError):
                (self.folder / kind).rmdir()
        with suppress(OSError):
            self.folder.rmdir()  # fails if it has other contents
