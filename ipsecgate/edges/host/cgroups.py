"""Find cgroups of the unified hierarchy: by path, systemd unit, container or id."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from ipsecgate.edges.host.mounts import mounted
from ipsecgate.errors import GateError, KernelLacksError, UsageError


def root() -> Path:
    """Return where cgroup2 is mounted. Raises: KernelLacksError."""
    for path, kind in mounted():
        if kind == "cgroup2":
            return path
    raise KernelLacksError(
        "no cgroup2 hierarchy is mounted",
        hint="mount -t cgroup2 cgroup2 /sys/fs/cgroup; below `ip netns exec`, which hides it, use "
        "`nsenter --net=` instead",
    )


def find(target: str) -> list[Path]:
    """Return the existing cgroups that a target names: a path, unit:NAME or container:ID.

    Some runtimes nest a cgroup of the same name in a container's: only the outermost is returned,
    because gating it gates all.
    """
    if not is_pattern(target):
        return [Path(target)] if (Path(target) / "cgroup.procs").is_file() else []
    found = [path for path in walk() if names(target, path)]
    return [
        path
        for path in found
        if not any(other != path and path.is_relative_to(other) for other in found)
    ]


def is_pattern(target: str) -> bool:
    """Return whether a target names cgroups by the last part of their path (unit:, container:)."""
    return target.startswith(("unit:", "container:"))


def names(target: str, path: Path) -> bool:
    """Return whether a target names this path, whether such a cgroup exists or not."""
    kind, _, name = target.partition(":")
    match kind:
        case "unit":
            return path.name == (name if "." in name else f"{name}.service")
        case "container":
            return len(name) >= 6 and name in path.name
    return path == Path(target)


def resolve(target: str) -> Path:
    """Return the one cgroup that a target names.

    Raises: UsageError if there is none, or more than one.
    """
    found = find(target)
    if not found:
        raise UsageError(
            f"{target} names no cgroup" if is_pattern(target) else f"{target} is not a cgroup",
            hint=f"use a path below {root()}, unit:NAME or container:ID",
        )
    if len(found) != 1:
        several = ", ".join(str(path) for path in found[:4])
        raise UsageError(
            f"{target} names {len(found)} cgroups: {several}", hint="name one of them by its path"
        )
    return found[0]


def own() -> Path:
    """Return the cgroup of this process. Raises: KernelLacksError, OSError."""
    return of_process(os.getpid())


def of_process(pid: int) -> Path:
    """Return the cgroup of a process. Raises: KernelLacksError, OSError."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        number, _, path = line.split(":", 2)
        if number == "0":
            return root() / path.strip("/")
    raise KernelLacksError(
        f"process {pid} is not in a cgroup of the unified hierarchy (cgroup2)",
        hint="boot with systemd.unified_cgroup_hierarchy=1",
    )


def join(cgroup: Path) -> None:
    """Move this process into a cgroup. Raises: GateError."""
    try:
        # Unbuffered: a buffered file would report the error only when it is closed.
        fd = os.open(cgroup / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"0")
        finally:
            os.close(fd)
    except OSError as error:
        hint = "run it as root"
        if error.errno == errno.EBUSY:
            hint = "it passes resource controllers to cgroups below it: name one of these"
        raise GateError(f"cannot join {cgroup}: {error.strerror}", hint=hint) from error


def walk() -> Iterator[Path]:
    """Yield every cgroup, parents first."""
    for folder, _, _ in os.walk(root()):
        yield Path(folder)


def by_id() -> dict[int, Path]:
    """Return every cgroup by its id: the inode number of its folder."""
    found = {}
    for path in walk():
        try:
            found[path.stat().st_ino] = path
        except FileNotFoundError:
            continue  # removed while walking
    return found
