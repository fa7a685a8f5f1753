"""Limits of the kernel and of a process, and how much is used."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

_INOTIFY = Path("/proc/sys/fs/inotify")


def inotify_watches() -> int | None:
    """Return how many folders and files a user may watch, None if the kernel does not say."""
    with suppress(OSError, ValueError):
        return int((_INOTIFY / "max_user_watches").read_text())
    return None


def descriptors(pid: int) -> tuple[int, int] | None:
    """Return how many descriptors a process has and may have; None if that cannot be read."""
    process = Path(f"/proc/{pid}")
    with suppress(OSError):
        match = re.search(r"Max open files\s+(\d+)", (process / "limits").read_text())
        if match:
            return len(list((process / "fd").iterdir())), int(match[1])
    return None
