"""Find cgroups of the unified hierarchy: by path, systemd unit, container or id.

/sys/fs/cgroup/a/b   that cgroup
unit:NAME            the system's unit: not a user's of the same name, nor one in a container
container:NAME       the container of that id, of an id that begins so, or of that name
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path

from ipsecgate.edges.host import runtimes
from ipsecgate.edges.host.mounts import mounted
from ipsecgate.errors import GateError, KernelLacksError, UsageError

SHORT_ID = 6  # digits of a container's id that name it
SHOWN_ID = 12  # digits by which the runtimes list it
_CONTAINER = re.compile(
    r"(?:(?:libpod|docker|crio|cri-containerd|nerdctl|runc|crun)-)?([A-Za-z0-9][\w.+-]*?)(?:\.scope)?"
)
Names = Mapping[str, Set[str]]
"""The names of containers, by id."""


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
    """Return the existing cgroups that a target names.

    Some runtimes nest a cgroup of the same name in a container's: only the outermost is returned,
    because gating it gates all.
    """
    if not is_pattern(target):
        return [Path(target)] if (Path(target) / "cgroup.procs").is_file() else []
    known = runtimes.names() if target.startswith("container:") else {}
    found = [path for path in walk() if _names(target, path, known)]
    return [
        path
        for path in found
        if not any(other != path and path.is_relative_to(other) for other in found)
    ]


def unit_in(path: Path) -> str:
    """Return the name of the unit that a cgroup belongs to, "" if there is none."""
    above = (path, *path.parents)
    return next((one.name for one in above if one.suffix in (".service", ".scope")), "")


def container_in(path: Path) -> str:
    """Return the id of the container that a cgroup belongs to, "" if there is none."""
    matches = (_CONTAINER.fullmatch(part) for part in reversed(path.parts))
    return next((one[1] for one in matches if one and runtimes.ID.fullmatch(one[1])), "")


def is_pattern(target: str) -> bool:
    """Return whether a target names cgroups by their unit or container."""
    return target.startswith(("unit:", "container:"))


def naming(path: Path, targets: Iterable[str]) -> set[str]:
    """Return those of the targets that name this path, whether such a cgroup exists or not."""
    known = runtimes.names() if runtimes.ID.search(path.name) else {}
    return {target for target in targets if _names(target, path, known)}


def targets_of(path: Path, known: Names) -> Iterator[str]:
    """Yield the targets that name a cgroup as a service, a slice or a container, the shortest ones.

    `known`: the containers of `runtimes.names`. One without a name is named by its id.
    """
    if path.suffix in (".service", ".slice") and _is_outermost(path):
        short = path.name.removesuffix(".service")
        yield f"unit:{path.name if '.' in short else short}"
    match = _CONTAINER.fullmatch(path.name)
    if match is not None and runtimes.ID.fullmatch(match[1]):
        names = sorted(known.get(match[1], ())) or [match[1][:SHOWN_ID]]
        yield from (f"container:{name}" for name in names)


def _names(target: str, path: Path, known: Names) -> bool:
    kind, _, name = target.partition(":")
    match kind:
        case "unit":
            wanted = name if "." in name else f"{name}.service"
            return path.name == wanted and _is_outermost(path)
        case "container":
            return _is_container(name, path, known)
    return path == Path(target)


def _is_outermost(path: Path) -> bool:
    """Tell whether no unit or container is around a unit: it is the system's."""
    return not any(
        parent.name.endswith((".service", ".scope")) or runtimes.ID.fullmatch(parent.name)
        for parent in path.parents
    )


def _is_container(name: str, path: Path, known: Names) -> bool:
    match = _CONTAINER.fullmatch(path.name)
    if match is None:
        return False
    ident = match[1]
    if name == ident or name in known.get(ident, ()):
        return True
    return len(name) >= SHORT_ID and bool(runtimes.ID.fullmatch(ident)) and ident.startswith(name)


def resolve(target: str) -> Path:
    """Return the one cgroup that a target names.

    Raises: UsageError if there is none, or more than one.
    """
    found = find(target)
    if not found:
        raise UsageError(
            f"{target} is not running" if is_pattern(target) else f"{target} is not a cgroup",
            hint=f"use a path below {root()}, unit:NAME or container:NAME",
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


def processes(cgroup: Path) -> Iterator[int]:
    """Yield the processes in a cgroup and in those inside it."""
    for folder, _, _ in os.walk(cgroup):
        try:
            text = Path(folder, "cgroup.procs").read_text()
        except OSError:
            continue  # removed meanwhile, or with threads of its own (EOPNOTSUPP)
        # 0: a process of a PID namespace that is not inside ours.
        yield from (int(word) for word in text.split() if word != "0")


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
