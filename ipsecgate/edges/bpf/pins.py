"""Where the gate's objects are in bpffs, and how one version replaces another.

    <bpffs>/ipsecgate/<instance>/maps/<map>, progs/<hook>   the version in force (`objects`)
                                /links/<hook>-<cgroup id>
                                /moved/                     links that replace those of their name
                                /next/                      the version that will replace it
                                /old/                       the version that was replaced

A pinned link keeps refusing after every process has ended, and `bpf_link_update` replaces its
program atomically. So nothing here ever detaches a program in order to attach another.

A version with other maps is pinned aside, as `next`. The current version stays in force with its
tables until the controller has published tables in the new maps. Then every link is switched, and
`old` is created to record that. Any later load or switch that finds `old` moves the folders into
place. So an interruption at any point leaves a state that the next load completes.
"""

from __future__ import annotations

import errno
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ipsecgate import trust
from ipsecgate.core.model.value import value
from ipsecgate.edges.bpf import exclusive, libbpf
from ipsecgate.edges.bpf.libbpf import closing_fd
from ipsecgate.edges.bpf.objects import HOOKS, KINDS, Objects
from ipsecgate.edges.host.mounts import type_of
from ipsecgate.errors import GateError, KernelLacksError

if TYPE_CHECKING:
    from ipsecgate.edges.bpf.bytecode import Bytecode

log = logging.getLogger("ipsecgate")


@value
class Attachment:
    """One hook on one cgroup."""

    hook: str
    cgroup_id: int
    prog_id: int


def ensure_bpffs(path: Path) -> None:
    """Mount bpffs at the path unless it is mounted. Raises: KernelLacksError."""
    if type_of(path) == "bpf":
        return
    path.mkdir(parents=True, exist_ok=True)
    # By default every user may create folders in a bpffs, and so ours before we do.
    run = trust.run(["mount", "-t", "bpf", "-o", "mode=0700", "bpf", str(path)])
    if run.returncode:
        raise KernelLacksError(
            f"cannot mount bpffs on {path}: {run.stderr.strip()}",
            hint="mounting needs CONFIG_BPF_SYSCALL and CAP_SYS_ADMIN",
        )


class Pins:
    """The pinned objects of one instance. Keeps no descriptors open."""

    def __init__(self, bpffs: Path, instance: str) -> None:
        self.bpffs = bpffs
        self.root = bpffs / "ipsecgate" / instance
        self.current = Objects(self.root)
        self.next = Objects(self.root / "next")
        self._old = Objects(self.root / "old")

    @property
    def loaded(self) -> bool:
        """Whether this version is completely pinned, in force or as the next one."""
        return self.objects.is_complete

    @property
    def objects(self) -> Objects:
        """This version's objects: the next ones if there are any, else those in force."""
        return self.next if self.next.exists else self.current

    def load(self, bytecode: Bytecode, *, audit: bool = False) -> None:
        """Pin this version. Links run its programs at once, or after `switch` if maps differ.

        With new maps the hooks refuse every flow that is not exempt until tables are published, or
        with `audit` only count it; never while another version gates something, because only the
        controller opens that. Raises: OSError (ENOSPC, EPERM …); GateError.
        """
        ensure_bpffs(self.bpffs)
        for folder in (self.root.parent, self.root, self.root / "links"):
            trust.folder(folder, 0o700)
        self._move_into_place()
        self._finish_moves()
        if self.next.exists and not self.next.fits(bytecode):
            self.next.remove()
        gates = bool(self._links())
        if self.current.fits(bytecode):
            self.current.pin(bytecode, audit=audit and not gates)
            self._update_links(self.current)
            self.next.remove()
            return
        self.next.pin(bytecode, audit=audit and not gates)
        if not gates:
            self.switch()

    def switch(self) -> None:
        """Put the next version in force, if there is one. Raises: OSError."""
        if self.next.exists:
            self._update_links(self.next)
            self._old.folder.mkdir(mode=0o700, exist_ok=True)
            self._move_into_place()

    def _update_links(self, objects: Objects) -> None:
        """Make every link run these programs.

        Removes links of hooks that this version does not have, and of removed cgroups: the kernel
        has already detached those (ENOLINK), so they refuse nothing.
        """
        for path in self._links():
            hook = path.name.split("-")[0]
            if hook not in objects.hooks():
                path.unlink()
                continue
            with (
                closing_fd(libbpf.open_pin(path)) as link,
                closing_fd(objects.open_program(hook)) as prog,
            ):
                try:
                    libbpf.update_link(link, prog)
                except OSError as error:
                    if error.errno != errno.ENOLINK:
                        raise
                    path.unlink()

    def _move_into_place(self) -> None:
        """Move the next version to its place, if `old` says that every link runs it."""
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
        """Attach every hook of the version in force to a cgroup, except those attached already.

        Raises: OSError, GateError.
        """
        if not self.loaded:
            raise GateError(f"no hooks are loaded in {self.root}", hint="first `ipsecgate load`")
        made: list[Path] = []
        try:
            with closing_fd(os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)) as directory:
                # The id of what we opened: the path may name another cgroup by now.
                cgroup_id = os.fstat(directory).st_ino
                for hook in sorted(self.current.hooks() & HOOKS.keys()):
                    path = self.root / "links" / f"{hook}-{cgroup_id}"
                    if path.exists():
                        continue
                    with (
                        closing_fd(self.current.open_program(hook)) as prog,
                        closing_fd(_link(prog, directory, cgroup, hook)) as link,
                    ):
                        libbpf.pin(link, path)
                        made.append(path)
                    _warn_of_replaced(cgroup, hook)
        except (OSError, GateError):
            # All or none: a cgroup that is gated for one family only would look protected.
            for path in made:
                path.unlink()
            raise

    def move_last(self, cgroup: Path, hook: str) -> None:
        """Have a hook run after all other programs of a gated cgroup.

        It is attached anew, and only then detached from its old place. Raises: OSError, GateError.
        """
        moved = self.root / "moved"
        with closing_fd(os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)) as directory:
            path = self.root / "links" / f"{hook}-{os.fstat(directory).st_ino}"
            trust.folder(moved, 0o700)
            with (
                closing_fd(self.current.open_program(hook)) as prog,
                closing_fd(_link(prog, directory, cgroup, hook)) as link,
            ):
                libbpf.pin(link, moved / path.name)
        self._finish_moves()

    def _finish_moves(self) -> None:
        """Put links that were attached anew in the place of the old ones."""
        moved = self.root / "moved"
        if not moved.is_dir():
            return
        for new in moved.iterdir():
            old = self.root / "links" / new.name
            with suppress(FileNotFoundError):
                _detach(old)
            new.rename(old)
        moved.rmdir()

    def detach(self, cgroup_id: int) -> int:
        """Detach every hook from a cgroup; return how many there were. Raises: OSError."""
        paths = [p for p in self._links() if p.name.endswith(f"-{cgroup_id}")]
        for path in paths:
            _detach(path)
        return len(paths)

    def attachments(self) -> list[Attachment]:
        """Return what is attached.

        Cgroup ids come from the pins' names, because the kernel forgets those of removed cgroups.
        """
        found = []
        for path in self._links():
            try:
                with closing_fd(libbpf.open_pin(path)) as link:
                    info = libbpf.link_info(link)
            except FileNotFoundError:
                continue  # the controller has just removed it, because its cgroup is gone
            found.append(
                Attachment(path.name.split("-")[0], int(path.name.split("-")[1]), info.prog_id)
            )
        return found

    def unload(self) -> None:
        """Detach and remove everything: the gate is open afterwards. Raises: OSError."""
        self._finish_moves()
        for path in self._links():
            _detach(path)
        with suppress(FileNotFoundError):
            (self.root / "links").rmdir()
        for objects in (self.next, self._old, self.current):
            objects.remove()
        with suppress(OSError):
            self.root.parent.rmdir()  # fails if there are other instances


def _link(prog: int, directory: int, cgroup: Path, hook: str) -> int:
    """Attach a program to a cgroup. Raises: OSError, ExclusiveProgramError."""
    attach_type = HOOKS[hook].attach_type
    try:
        return libbpf.create_link(prog, directory, attach_type)
    except PermissionError as error:
        raise exclusive.explain(cgroup, hook, attach_type) or error from error


def _warn_of_replaced(cgroup: Path, hook: str) -> None:
    with suppress(OSError):  # the cgroup may be gone by now
        if lost := exclusive.replaced(cgroup, HOOKS[hook].attach_type):
            log.warning(
                "%s no longer runs at %s for %s: it was attached so that any program below "
                "replaces it (BPF_F_ALLOW_OVERRIDE)",
                lost,
                hook,
                cgroup,
            )


def _detach(link: Path) -> None:
    with closing_fd(libbpf.open_pin(link)) as fd:
        libbpf.detach_link(fd)
    link.unlink()
