"""File locks, which the kernel releases when the process that holds them dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ipsecgate import trust
from ipsecgate.errors import GateError


@contextmanager
def held(path: Path, *, wait: bool, busy: str) -> Iterator[None]:
    """Hold a lock file during the block. Raises: GateError `busy` if it is held and not `wait`."""
    trust.folder(path.parent)
    fd = trust.open_file(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise GateError(f"{busy} (lock {path})") from None
        yield
    finally:
        os.close(fd)
