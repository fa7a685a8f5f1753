"""Tell which folders of a tree come and go: inotify(7), which the cgroup file system supports.

Rules of this module: a folder is watched before its own folders are looked for, so none is
missed; one may be told twice. What the kernel could not queue is told as `Overflow`.
"""

from __future__ import annotations

import ctypes as ct
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_CREATE, _DELETE, _OVERFLOW, _IGNORED = 0x100, 0x200, 0x4000, 0x8000
_ONLYDIR, _ISDIR = 0x0100_0000, 0x4000_0000
_HEADER = struct.Struct("=iIII")  # struct inotify_event: wd, mask, cookie, length of the name
_READ = 1 << 16

_libc = ct.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Appeared:
    """A folder is there."""

    path: Path


@dataclass(frozen=True, slots=True)
class Vanished:
    """A folder is gone; another of its name may be there by now."""

    path: Path


@dataclass(frozen=True, slots=True)
class Overflow:
    """More happened than was told: look at all of it."""


News = Appeared | Vanished | Overflow


class Folders:
    """Watches the folders that `wanted` names, from `root` down; `fd` is readable on news.

    Raises: OSError where the kernel has no watches left (fs.inotify.max_user_watches).
    """

    def __init__(self, root: Path, wanted: Callable[[Path], bool]) -> None:
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

    def news(self) -> Iterator[News]:
        """Yield what happened since, in order. Raises: OSError."""
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
                yield from self._told(number, mask, name)

    def _told(self, number: int, mask: int, name: str) -> Iterator[News]:
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

    def _watch(self, folder: Path) -> Iterator[News]:
        """Watch a folder and what is in it; yield what is in it."""
        if not self._wanted(folder):
            return
        flags = _CREATE | _DELETE | _ONLYDIR
        number = _libc.inotify_add_watch(self.fd, os.fsencode(folder), flags)
        if number < 0:
            code = ct.get_errno()
            if not folder.is_dir():
                return  # gone again
            raise OSError(code, f"watch {folder}: {os.strerror(code)}")
        self._paths[number] = folder
        try:
            inside = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir()]
        except FileNotFoundError:
            return
        for path in inside:
            yield Appeared(path)
            yield from self._watch(path)
