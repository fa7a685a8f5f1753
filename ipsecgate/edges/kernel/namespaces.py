"""Other network namespaces: found by a process, recognised by their cookie, entered by a thread.

Rules of this module:
- A process id says nothing for sure: the process may have ended, and another may have its number,
  or it may have changed its namespace. So what is opened counts only if its cookie is as wanted.
- Only a thread made for that enters a namespace, opens sockets there, and ends. No thread that does
  other work is ever in another namespace.
- An open `Namespace` keeps the kernel's alive, with all its devices. Close it when no gated process
  is left there.

Source: setns(2), pidfd_open(2), SO_NETNS_COOKIE in net/core/sock.c (Linux 5.14).
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self, TypeVar

from ipsecgate.edges.kernel.probe import netns_cookie

CLONE_NEWNET = 0x40000000
T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """An open network namespace.

    `fd`: a descriptor of it. `cookie`: unique until reboot. `inode`: its number in nsfs, which no
    other namespace has while this one is open.
    """

    def __init__(self, fd: int) -> None:
        """Take over a descriptor. Raises: OSError if it cannot be entered; then it is closed."""
        self.fd = fd
        self.inode = os.fstat(fd).st_ino
        try:
            self.cookie = self.run(netns_cookie)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def of_thread(cls, pid: int) -> Self:
        """Open the namespace of a process or thread. Raises: OSError."""
        return cls(os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC))

    def run(self, work: Callable[[], T]) -> T:
        """Call a function in a thread inside the namespace; return its result. Raises: likewise."""
        result: list[T] = []
        errors: list[BaseException] = []

        def enter() -> None:
            try:
                if _libc.setns(self.fd, CLONE_NEWNET):
                    number = ctypes.get_errno()
                    raise OSError(number, f"setns: {os.strerror(number)}")
                result.append(work())
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=enter, name="namespace")
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return result[0]

    def socket(self, family: int, kind: int, proto: int) -> socket.socket:
        """Open a socket in the namespace. Raises: OSError."""
        return self.run(lambda: socket.socket(family, kind, proto))

    def close(self) -> None:
        """Let go of the namespace."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def find(cookie: int, pids: Iterable[int]) -> tuple[Namespace, int] | None:
    """Return the namespace with this cookie and the process that is in it, None if none is.

    The first of `pids` are tried first. Each namespace is entered only once.
    Raises: PermissionError.
    """
    tried: set[int] = set()
    for pid in pids:
        for thread, number in _threads(pid):
            if number in tried:
                continue
            tried.add(number)
            try:
                found = Namespace.of_thread(thread)
            except PermissionError:
                raise
            except OSError:
                continue  # it has ended
            if found.cookie == cookie:
                return found, pid
            found.close()
    return None


def inode(pid: int) -> int | None:
    """Return the number that a process's namespace has in nsfs; None if the process has ended."""
    try:
        return Path(f"/proc/{pid}/ns/net").stat().st_ino
    except OSError:
        return None


def _threads(pid: int) -> Iterator[tuple[int, int]]:
    """Yield the threads of a process, its main thread first, each with its namespace's number."""
    first = inode(pid)
    if first is not None:
        yield pid, first
    with suppress(OSError):
        for entry in sorted(Path(f"/proc/{pid}/task").iterdir()):
            number = inode(int(entry.name))
            if number is not None:
                yield int(entry.name), number
