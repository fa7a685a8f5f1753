"""Where the gate's objects live in bpffs, and how one version follows another.

    <bpffs>/ipsecgate/<instance>/maps/<map>, progs/<hook>   the version in force (`objects`)
                                /links/<hook>-<cgroup id>
                                /next/                      one that is about to be
                                /old/                       one that is no more

A pinned link keeps refusing when every process is gone, and `bpf_link_update`
replaces its program with no moment in between; so nothing here ever detaches
in order to attach.

A version with other maps is pinned aside, as `next`. The one before stays in force with
its tables until the controller has published in the new maps; then the links are switched,
and `old` is made, which says that they all are. Whoever finds `old` moves the folders to
their places: so an end in the middle of it, wherever, leaves nothing that the next load
does not finish.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ipsecgate import trust
from ipsecgate.edges.bpf import libbpf
from ipsecgate.edges.bpf.bytecode import Bytecode
from ipsecgate.edges.bpf.objects import HOOKS, KINDS, Objects, opened
from ipsecgate.edges.host.mounts import type_of
from ipsecgate.errors import GateError, KernelLacksError


@dataclass(frozen=True, slots=True)
class Attachment:
    """One hook on one cgroup."""

    hook: str
    cgroup_id: int
    prog_id: int


def ensure_bpffs(path: Path) -> None:
    """Mount bpffs at the path if nothing did. Raises: KernelLacksError."""
    if type_of(path) == "bpf":
        return
    path.mkdir(parents=True, exist_ok=True)
    # Without a mode everybody may make folders in it, and so ours before we do.
    run = trust.run(["mount", "-t", "bpf", "-o", "mode=0700", "bpf", str(path)])
    if run.returncode:
        raise KernelLacksError(
            f"cannot mount bpffs on {path}: {run.stderr.strip()}",
            hint="mounting needs CONFIG_BPF_SYSCALL and CAP_SYS_ADMIN",
        )


class Pins:
    """The pinned objects of one instance. Holds no descriptors of its own."""

    def __init__(self, bpffs: Path, instance: str) -> None:
        self.bpffs = bpffs
        self.root = bpffs / "ipsecgate" / instance
        self.current = Objects(self.root)
        self.next = Objects(self.root / "next")
        self._old = Objects(self.root / "old")

    @property
    def loaded(self) -> bool:
        """Tell whether a version is in force, or about to be."""
        return self.objects.whole

    @property
    def objects(self) -> Objects:
        """The objects of this version: those in force, or the next ones."""
        return self.next if self.next.any else self.current

    def load(self, bytecode: Bytecode) -> None:
        """Make the pins be this version; links switch to its programs at once, or after `switch`.

        New pins refuse whatever is not exempt until tables are published.
        Raises: OSError (ENOSPC, EPERM …).
        """
        ensure_bpffs(self.bpffs)
        for folder in (self.root.parent, self.root, self.root / "links"):
            trust.folder(folder, 0o700)
        self._finish()
        if self.next.any and not self.next.fit(bytecode):
            self.next.remove()
        if self.current.fit(bytecode):
            self.current.make(bytecode)
            self._point_links(self.current)
            self.next.remove()
            return
        self.next.make(bytecode)
        if not self._links():
            self.switch()

    def switch(self) -> None:
        """Put the next version in force, if there is one. Raises: OSError."""
        if self.next.any:
            self._point_links(self.next)
            self._old.folder.mkdir(mode=0o700, exist_ok=True)
            self._finish()

    def _point_links(self, objects: Objects) -> None:
        """Have every link run these programs.

        Gone are those of a hook that there is not any more, and of a cgroup that was removed: the
        kernel has severed these, and they refuse nothing.
        """
        for path in self._links():
            hook = path.name.split("-")[0]
            if hook not in objects.hooks():
                path.unlink()
                continue
            with opened(libbpf.open_pin(path)) as link, opened(objects.open_program(hook)) as prog:
                try:
                    libbpf.update_link(link, prog)
                except OSError as error:
                    if error.errno != errno.ENOLINK:
                        raise
                    path.unlink()

    def _finish(self) -> None:
        """Move the next version to its place, where every link runs it already."""
        if not self._old.folder.is_dir():
            return
        for kind in KINDS:
            if (self.next.folder / kind).is_dir():
                if (self.root / kind).is_dir():
                    (self.root / kind).rename(self._old.folder / kind)
                (self.next.folder / kind).rename(self.root / kind)
        self.next.remove()
        self._old.remove()

    def _links(self) -> list[Path]:
        folder = self.root / "links"
        return sorted(folder.iterdir()) if folder.is_dir() else []

    def attach(self, cgroup: Path) -> None:
        """Put every hook of the version in force on a cgroup; those already there stay.

        Raises: OSError, GateError.
        """
        if not self.loaded:
            raise GateError(f"no hooks are loaded in {self.root}", hint="first `ipsecgate load`")
        made: list[Path] = []
        try:
            with opened(os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)) as directory:
                # Of what is open, not of the name: that may be another's by now.
                cgroup_id = os.fstat(directory).st_ino
                for hook in sorted(self.current.hooks() & HOOKS.keys()):
                    path = self.root / "links" / f"{hook}-{cgroup_id}"
                    if path.exists():
                        continue
                    with (
                        opened(self.current.open_program(hook)) as prog,
                        opened(libbpf.create_link(prog, directory, HOOKS[hook][1])) as link,
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
            _detach(path)
        return len(paths)

    def attachments(self) -> list[Attachment]:
        """Return what is attached, by the pins' names; the kernel forgets a removed cgroup's id."""
        found = []
        for path in self._links():
            try:
                with opened(libbpf.open_pin(path)) as link:
                    info = libbpf.link_info(link)
            except FileNotFoundError:
                continue  # its cgroup is gone, and the controller has just removed it
            found.append(
                Attachment(path.name.split("-")[0], int(path.name.split("-")[1]), info.prog_id)
            )
        return found

    def unload(self) -> None:
        """Remove every pin: the gate is open afterwards."""
        for path in self._links():
            _detach(path)
        with suppress(FileNotFoundError):
            (self.root / "links").rmdir()
        for objects in (self.next, self._old, self.current):
            objects.remove()
        with suppress(OSError):
            self.root.parent.rmdir()  # the last instance's


def _detach(link: Path) -> None:
    with opened(libbpf.open_pin(link)) as fd:
        libbpf.detach_link(fd)
    link.unlink()
