"""Limit a resource for the duration of a block: descriptors, disk space, memory."""

from __future__ import annotations

import resource
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ipsecgate.edges.host import cgroups
from tests.chaos.fault_tools import controller
from tests.chaos.world import World


@contextmanager
def few_descriptors(world: World, spare: int) -> Iterator[None]:
    """Leave a running controller only `spare` descriptors; the end restores the limit."""
    pid = controller(world)
    if not pid:
        yield
        return
    used = {int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    lowest = next(number for number in range(len(used) + 1) if number not in used)
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest + spare, before[1]))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # it may have exited, as documented
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Fill a disk to the last byte. A read-only disk counts as full."""
    filler = disk / f"filler-{time.monotonic_ns()}"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        for size in (4096, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))
    try:
        yield
    finally:
        if filler.exists():  # not on a read-only disk
            filler.unlink()


@contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """Remount a disk read-only. This does nothing if a file on it is open for writing."""
    remount = ["mount", "-o", "remount,{}", str(disk)]
    try:
        subprocess.run([word.format("ro") for word in remount], check=False, capture_output=True)
        yield
    finally:
        subprocess.run([word.format("rw") for word in remount], check=True)


@contextmanager
def little_memory(world: World, limit: int) -> Iterator[None]:
    """Limit a running controller's further memory to `limit` bytes; beyond, the kernel kills it."""
    pid = controller(world)
    if not pid or "memory" not in (cgroups.root() / "cgroup.controllers").read_text().split():
        yield
        return
    before = cgroups.of_process(pid)
    group = world.lab.cgroup("little-memory")
    for parent in (cgroups.root(), group.parent):
        (parent / "cgroup.subtree_control").write_text("+memory")
    (group / "memory.max").write_text(str(limit))
    try:
        move(pid, group)
        yield
    finally:
        move(pid, before)


def move(pid: int, group: Path) -> None:
    with suppress(ProcessLookupError):
        (group / "cgroup.procs").write_text(str(pid))
