"""Report which folders of a tree appear and vanish, or what appears in one folder: inotify(7).

A cgroup can also be reported when its first process comes or its last one goes.

Rule of this module: watch a folder before listing its contents, so that none is missed. A folder
may therefore be reported twice. If the kernel's queue overflows, `Overflow` says so.
"""

from __future__ import annotations

import ctypes as ct
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from ipsecgate.core.model.value import value

_CREATE, _DELETE, _OVERFLOW, _IGNORED = 0x100, 0x200, 0x4000, 0x8000
_MODIFY, _MOVED_TO = 0x2, 0x80
_ONLYDIR, _ISDIR = 0x0100_0000, 0x4000_0000
_HEADER = struct.Struct("=iIII")  # struct inotify_event: wd, mask, cookie, length of the name
_READ = 1 << 16

_libc = ct.CDLL(None, use_errno=True)


@value
class Appeared:
    """A folder exists."""

    path: Path


@value
class Vanished:
    """A folder was removed; another of the same name may exist by now."""

    path: Path


@value
class Populated:
    """The first process of a cgroup, or of one inside it, has come, or the last one has gone."""

    path: Path


@value
class Overflow:
    """Events were lost: read the whole tree again."""


Event = Appeared | Vanished | Populated | Overflow


class Arrivals:
    """Tells when a name appears in a folder: `fd` becomes readable. `gone`: or when one goes."""

    def __init__(self, folder: Path, *, gone: bool = False) -> None:
        """Raises: OSError, for example if the folder does not exist."""
        self.fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            raise OSError(ct.get_errno(), f"inotify: {os.strerror(ct.get_errno())}")
        flags = _CREATE | _MOVED_TO | _ONLYDIR | (_DELETE if gone else 0)
        if _libc.inotify_add_watch(self.fd, os.fsencode(folder), flags) < 0:
            code = ct.get_errno()
            os.close(self.fd)
            raise OSError(code, f"watch {folder}: {os.strerror(code)}")

    def clear(self) -> None:
        """Forget what has been told so far."""
        with suppress(BlockingIOError):
            while os.read(self.fd, _READ):
                pass

    def close(self) -> None:
        """Stop watching."""
        os.close(self.fd)


class Folders:
    """Watches the folders for which `wanted` is true, from `root` down.

    `fd` becomes readable when something happened. `population`: report `Populated`, too.
    """

    def __init__(
        self, root: Path, wanted: Callable[[Path], bool], *, population: bool = False
    ) -> None:
        """Raises: OSError, for example when fs.inotify.max_user_watches is reached."""
        self._wanted = wanted
        self._population = population
        self._paths: dict[int, Path] = {}
        self._populations: dict[int, Path] = {}
        self.fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            raise OSError(ct.get_errno(), f"inotify: {os.strerror(ct.get_errno())}")
        try:
            for _ in self._watch(root):
                pass
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Stop watching."""
        os.close(self.fd)

    def events(self) -> Iterator[Event]:
        """Yield what happened since the last call, in order. Raises: OSError."""
        while True:
            try:
                data = os.read(self.fd, _READ)
            except BlockingIOError:
                return
            at = 0
            while at < len(data):
                number, mask, _, length = _HEADER.unpack_from(data, at)
                at += _HEADER.size
                name = os.fsdecode(data[at : at + length].rstrip(b"\0"))
                at += length
                yield from self._decode(number, mask, name)

    def _decode(self, number: int, mask: int, name: str) -> Iterator[Event]:
        if mask & _OVERFLOW:
            yield Overflow()
        elif mask & _IGNORED:
            self._paths.pop(number, None)
            self._populations.pop(number, None)
        elif number in self._populations:
            yield Populated(self._populations[number])
        elif mask & _ISDIR and number in self._paths:
            path = self._paths[number] / name
            if mask & _DELETE:
                yield Vanished(path)
            elif mask & _CREATE:
                yield Appeared(path)
                yield from self._watch(path)

    def _watch(self, folder: Path) -> Iterator[Event]:
        """Watch a folder and those inside it; yield those inside."""
        if not self._wanted(folder):
            return
        number = self._add(folder, folder, _CREATE | _DELETE | _ONLYDIR)
        if number is None:
            return
        self._paths[number] = folder
        if self._population:
            # The kernel does not tell the folder of it, unless somebody has the file in use.
            number = self._add(folder, folder / "cgroup.events", _MODIFY)
            if number is not None:
                self._populations[number] = folder
        try:
            inside = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir()]
        except FileNotFoundError:
            return
        for path in inside:
            yield Appeared(path)
            yield from self._watch(path)

    def _add(self, folder: Path, path: Path, flags: int) -> int | None:
        """Watch a folder or a file in it; return the watch's number, None if it is gone."""
        number: int = _libc.inotify_add_watch(self.fd, os.fsencode(path), flags)
        if number < 0:
            code = ct.get_errno()
            if folder.is_dir() and path.exists():
                raise OSError(code, f"watch {path}: {os.strerror(code)}")
            return None
        return number
