"""Report which folders of a tree appear and vanish, or what appears in one folder: inotify(7).

Rule of this module: watch a folder before listing its contents, so that none is missed. A folder
may therefore be reported twice. If the kernel's queue overflows, `Overflow` says so.
"""

from __future__ import annotations

import ctypes as ct
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from ipsecgate.core.model.value import value

_CREATE, _DELETE, _OVERFLOW, _IGNORED = 0x100, 0x200, 0x4000, 0x8000
_MOVED_TO = 0x80
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
class Overflow:
    """Events were lost: read the whole tree again."""


Event = Appeared | Vanished | Overflow


class Arrivals:
    """Tells when a name appears in a folder: `fd` becomes readable."""

    def __init__(self, folder: Path) -> None:
        """Raises: OSError, for example if the folder does not exist."""
        self.fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            raise OSError(ct.get_errno(), f"inotify: {os.strerror(ct.get_errno())}")
        flags = _CREATE | _MOVED_TO | _ONLYDIR
        if _libc.inotify_add_watch(self.fd, os.fsencode(folder), flags) < 0:
            code = ct.get_errno()
            os.close(self.fd)
            raise OSError(code, f"watch {folder}: {os.strerror(code)}")

    def close(self) -> None:
        """Stop watching."""
        os.close(self.fd)


class Folders:
    """Watches the folders for which `wanted` is true, from `root` down.

    `fd` becomes readable when something happened.
    """

    def __init__(self, root: Path, wanted: Callable[[Path], bool]) -> None:
        """Raises: OSError, for example when fs.inotify.max_user_watches is reached."""
        self._wanted = wanted
        self._paths: dict[int, Path] = {}
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
        flags = _CREATE | _DELETE | _ONLYDIR
        number = _libc.inotify_add_watch(self.fd, os.fsencode(folder), flags)
        if number < 0:
            code = ct.get_errno()
            if not folder.is_dir():
                return  # removed meanwhile
            raise OSError(code, f"watch {folder}: {os.strerror(code)}")
        self._paths[number] = folder
        try:
            inside = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir()]
        except FileNotFoundError:
            return
        for path in inside:
            yield Appeared(path)
            yield from self._watch(path)
