"""Where the gate's objects live in bpffs, and how they come there.

    <bpffs>/ipsecgate/<instance>/maps/<map>
                                /progs/<hook>
                                /links/<hook>-<cgroup id>

A pinned link keeps refusing when every process is gone, and `bpf_link_update`
replaces its program with no moment in between; so nothing here ever detaches
in order to attach.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ipsecgate.core.layout import INDEX, LAYOUT, MAPS, SETTING, Setting
from ipsecgate.edges import libbpf
from ipsecgate.edges.bytecode import Bytecode
from ipsecgate.edges.mounts import type_of
from ipsecgate.errors import GateError, KernelLacksError


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


@dataclass(frozen=True, slots=True)
class Attachment:
    """One hook on one cgroup."""

    hook: str
    cgroup_id: int
    prog_id: int


@contextmanager
def opened(fd: int) -> Iterator[int]:
    """Close a descriptor when the block ends."""
    try:
        yield fd
    finally:
        os.close(fd)


def ensure_bpffs(path: Path) -> None:
    """Mount bpffs at the path if nothing did. Raises: KernelLacksError."""
    if type_of(path) == "bpf":
        return
    path.mkdir(parents=True, exist_ok=True)
    run = subprocess.run(
        ["mount", "-t", "bpf", "bpf", str(path)], capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise KernelLacksError(
            f"cannot mount bpffs on {path}: {run.stderr.strip()}",
            hint="the kernel needs CONFIG_BPF_SYSCALL, and the caller CAP_SYS_ADMIN",
        )


class Pins:
    """The pinned objects of one instance. Holds no descriptors of its own."""

    def __init__(self, bpffs: Path, instance: str) -> None:
        self.bpffs = bpffs
        self.root = bpffs / "ipsecgate" / instance

    @property
    def loaded(self) -> bool:
        """Tell whether every map is pinned."""
        return all((self.root / "maps" / name).exists() for name in MAPS)

    def open_map(self, name: str) -> int:
        """Open a pinned map. Raises: OSError."""
        return libbpf.open_pin(self.root / "maps" / name)

    def load(self, bytecode: Bytecode) -> None:
        """Make the pins be this version: create or adopt the maps, replace the programs.

        New pins refuse whatever is not exempt until tables are published. Links
        that are there switch to the new programs one by one, each at once.
        Raises: GateError for pins of another version, OSError (ENOSPC, EPERM …).
        """
        ensure_bpffs(self.bpffs)
        for folder in ("maps", "progs", "links"):
            (self.root / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
        fds = {}
        try:
            for name, shape in bytecode.maps.items():
                fds[name] = self._map(name, shape)
            self._check_version(fds["settings"])
            for hook, kind in HOOKS.items():
                code = bytecode.programs[hook].linked(fds)
                with opened(libbpf.load_program(hook, code, *kind)) as prog:
                    self._replace_program(hook, prog)
        finally:
            for fd in fds.values():
                os.close(fd)

    def _map(self, name: str, shape: libbpf.MapShape) -> int:
        path = self.root / "maps" / name
        if not path.exists():
            fd = libbpf.create_map(name, shape)
            libbpf.pin(fd, path)
            return fd
        fd = libbpf.open_pin(path)
        if (found := libbpf.map_shape(fd)) != shape:
            os.close(fd)
            raise GateError(
                f"{path} has another shape ({found}) than this version's ({shape})",
                hint="another version loaded it: `ipsecgate unload --force` opens the gate "
                "and removes its pins",
            )
        return fd

    def _check_version(self, settings: int) -> None:
        key = INDEX.pack(Setting.VERSION)
        raw = libbpf.lookup(settings, key, SETTING.size) or SETTING.pack(0)
        (version,) = SETTING.unpack(raw)
        if version not in (0, LAYOUT):
            raise GateError(
                f"the pins in {self.root} have layout {version}, this version has {LAYOUT}",
                hint="`ipsecgate unload --force` opens the gate and removes its pins",
            )
        libbpf.update(settings, key, SETTING.pack(LAYOUT))

    def _replace_program(self, hook: str, prog: int) -> None:
        for path in self._links():
            if path.name.split("-")[0] == hook:
                with opened(libbpf.open_pin(path)) as link:
                    libbpf.update_link(link, prog)
        path = self.root / "progs" / hook
        path.unlink(missing_ok=True)  # the links hold their own reference
        libbpf.pin(prog, path)

    def _links(self) -> list[Path]:
        folder = self.root / "links"
        return sorted(folder.iterdir()) if folder.is_dir() else []

    def attach(self, cgroup: Path) -> None:
        """Put every hook on a cgroup; those already there stay. Raises: OSError, GateError."""
        if not self.loaded:
            raise GateError(f"nothing is loaded in {self.root}", hint="ipsecgate load")
        cgroup_id = cgroup.stat().st_ino
        made: list[Path] = []
        try:
            with opened(os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)) as directory:
                for hook, kind in HOOKS.items():
                    path = self.root / "links" / f"{hook}-{cgroup_id}"
                    if path.exists():
                        continue
                    with (
                        opened(libbpf.open_pin(self.root / "progs" / hook)) as prog,
                        opened(libbpf.create_link(prog, directory, kind.attach_type)) as link,
                    ):
                        libbpf.pin(link, path)
                        made.append(path)
        except OSError:
            # All or none: a cgroup gated for one family only is a hole that looks shut.
            for path in made:
                path.unlink()
            raise

    def detach(self, cgroup_id: int) -> int:
        """Take every hook off a cgroup, return how many there were."""
        paths = [p for p in self._links() if p.name.endswith(f"-{cgroup_id}")]
        for path in paths:
            path.unlink()
        return len(paths)

    def attachments(self) -> list[Attachment]:
        """Return what is attached, by the pins' names; the kernel forgets a removed cgroup's id."""
        found = []
        for path in self._links():
            with opened(libbpf.open_pin(path)) as link:
                info = libbpf.link_info(link)
            found.append(
                Attachment(path.name.split("-")[0], int(path.name.split("-")[1]), info.prog_id)
            )
        return found

    def unload(self) -> None:
        """Remove every pin: the gate is open afterwards."""
        for folder in ("links", "progs", "maps"):
            for path in sorted((self.root / folder).glob("*")):
                path.unlink()
            with suppress(FileNotFoundError):
                (self.root / folder).rmdir()
        with suppress(FileNotFoundError):
            self.root.rmdir()
        with suppress(OSError):
            self.root.parent.rmdir()  # the last instance's
