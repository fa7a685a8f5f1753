"""The cgroups (v2) of a lab: one subtree, created on demand and removed as a whole."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from ipsecgate.edges.host.cgroups import root
from ipsecgate.errors import KernelLacksError

REMOVAL_TIMEOUT = 30.0


def tops() -> list[Path]:
    """Return the cgroups directly below the mount; an empty list if cgroup2 is not mounted."""
    with contextlib.suppress(KernelLacksError):
        return [entry for entry in root().iterdir() if entry.is_dir()]
    return []


class Tree:
    """The cgroups of one lab, below a cgroup of the lab's name."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._root: Path | None = None

    def make(self, name: str) -> Path:
        """Create a cgroup and its parents, unless they exist, and return its path.

        Raises: KernelLacksError if cgroup2 is not mounted.
        """
        if self._root is None:
            self._root = root() / self._name
        path = self._root / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def remove(self) -> None:
        """Kill the processes in the cgroups and remove them all."""
        if self._root is not None:
            discard(self._root)


def members(folder: Path) -> list[int]:
    """Return the process ids in a cgroup, or the thread ids if the cgroup is threaded."""
    try:
        return [int(pid) for pid in (folder / "cgroup.procs").read_text().split()]
    except OSError:
        return [int(tid) for tid in (folder / "cgroup.threads").read_text().split()]


def discard(top: Path) -> None:
    """Kill the processes in a cgroup and below, by pid, and remove the whole subtree.

    Raises: OSError if a cgroup is still busy after `REMOVAL_TIMEOUT` seconds.
    """
    deadline = time.monotonic() + REMOVAL_TIMEOUT
    for folder, _, _ in os.walk(top, topdown=False):
        while Path(folder).exists():
            try:
                for pid in members(Path(folder)):
                    with contextlib.suppress(ProcessLookupError):
                        if pid != os.getpid():
                            os.kill(pid, signal.SIGKILL)
                Path(folder).rmdir()
            except OSError:  # busy, or another lab has just removed it
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
