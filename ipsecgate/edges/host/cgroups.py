"""Find cgroups of the unified hierarchy: by path, systemd unit, container or id.

/sys/fs/cgroup/a/b   that cgroup
unit:NAME            the system's unit: not a user's of the same name, nor one in a container
container:NAME       the container of that id, of an id that begins so, or of that name
label:KEY=VALUE      each container with that label; label:KEY: with any value
pod:NAMESPACE/NAME   each pod of Kubernetes; NAME may have the wildcards * ? [...]

The last three are explained in `container_targets`.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ipsecgate.edges.host import container_targets, runtimes
from ipsecgate.edges.host.mounts import mounted
from ipsecgate.edges.host.runtimes import Container, Unread
from ipsecgate.errors import GateError, KernelLacksError, UsageError

KINDS = "unit:NAME, container:NAME, label:KEY=VALUE or pod:NAMESPACE/NAME"
SHOWN_ID = 12  # digits by which the runtimes list a container
_CONTAINER = re.compile(
    r"(?:(?:libpod|libpod-payload|docker|crio|cri-containerd|nerdctl)-)?([0-9a-f]{64})(?:\.scope)?"
)


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
    """Return the existing cgroups that a target names."""
    return find_all([target])[target]


def find_all(targets: Iterable[str], unread: Unread | None = None) -> dict[str, list[Path]]:
    """Return the existing cgroups that each target names. `unread`: see `runtimes.containers`.

    Of a cgroup and those inside it only the outermost is returned, because gating it gates all.
    """
    targets = tuple(targets)
    found = {target: set() if is_pattern(target) else {Path(target)} for target in targets}
    units = [target for target in targets if target.startswith("unit:")]
    for path in walk() if units else ():
        for target in units:
            if _is_unit(target, path):
                found[target].add(path)
    for target, cgroup in _of_containers(targets, "", unread):
        found[target].add(cgroup)
    return {target: _outermost(filter(_exists, paths)) for target, paths in found.items()}


def _of_containers(
    targets: Iterable[str], ident: str, unread: Unread | None
) -> Iterator[tuple[str, Path]]:
    """Yield the targets that name a container, or the one of this id, and the cgroups to gate."""
    wanted = [target for target in targets if target.startswith(container_targets.KINDS)]
    top = root() if wanted else Path()
    for container in runtimes.containers(ident, unread=unread) if wanted else ():
        for target in wanted:
            cgroup = container_targets.named(target, container, top / container.cgroup)
            if cgroup is not None:
                yield target, cgroup


def _exists(cgroup: Path) -> bool:
    return (cgroup / "cgroup.procs").is_file()


def _outermost(found: Iterable[Path]) -> list[Path]:
    tops: list[Path] = []
    for path in sorted(found):  # what is above others comes first
        if not any(map(path.is_relative_to, tops)):
            tops.append(path)
    return tops


def unit_in(path: Path) -> str:
    """Return the name of the unit that a cgroup belongs to, "" if there is none."""
    above = (path, *path.parents)
    return next((one.name for one in above if one.suffix in (".service", ".scope")), "")


def container_in(path: Path) -> str:
    """Return the id of the container that a cgroup belongs to, "" if there is none."""
    matches = (_CONTAINER.fullmatch(part) for part in reversed(path.parts))
    return next((one[1] for one in matches if one), "")


def is_pattern(target: str) -> bool:
    """Return whether a target names cgroups by their unit, container, label or pod."""
    return target.startswith(("unit:", *container_targets.KINDS))


def checked(target: str) -> str:
    """Return a target as it is. Raises: ValueError if it is malformed."""
    if is_pattern(target) and target.endswith(":"):
        raise ValueError(f"{target!r} has no name")
    container_targets.check(target)
    return target


def naming(
    path: Path, targets: Sequence[str], unread: Unread | None = None
) -> list[tuple[str, Path]]:
    """Return the targets that name a cgroup that has appeared, each with the cgroup to gate.

    That is the same one, or the one of the pod that it is in. `unread`: as for `find_all`.
    """
    here = [target for target in targets if path == Path(target) or _is_unit(target, path)]
    ident = runtimes.ID.search(path.name)
    of_containers = _of_containers(targets, ident[0] if ident else path.name, unread)
    around = ((target, cgroup) for target, cgroup in of_containers if path.is_relative_to(cgroup))
    return [*((target, path) for target in here), *around]


def absence(target: str) -> str:
    """Return why a target names no cgroup: a sentence without its end."""
    if target.startswith(container_targets.KINDS):
        return container_targets.absence(target)
    return f"cgroup {target} does not exist"


def targets_of(path: Path, known: Mapping[Path, Container]) -> Iterator[str]:
    """Yield the targets that name a cgroup as a service, a slice or a container, the shortest ones.

    `known`: the containers, by cgroup. One without a name is named by its id.
    """
    if path.suffix in (".service", ".slice") and _is_outermost(path):
        short = path.name.removesuffix(".service")
        yield f"unit:{path.name if '.' in short else short}"
    container = known.get(path)
    if container is not None:
        for name in sorted(container.names) or [container.ident[:SHOWN_ID]]:
            yield f"container:{name}"


def containers() -> dict[Path, Container]:
    """Return the containers, by cgroup."""
    top = root()
    return {top / container.cgroup: container for container in runtimes.containers()}


def _is_unit(target: str, path: Path) -> bool:
    kind, _, name = target.partition(":")
    wanted = name if "." in name else f"{name}.service"
    return kind == "unit" and path.name == wanted and _is_outermost(path)


def _is_outermost(path: Path) -> bool:
    """Tell whether no unit or container is around a unit: it is the system's."""
    return not any(
        parent.name.endswith((".service", ".scope")) or runtimes.ID.fullmatch(parent.name)
        for parent in path.parents
    )


def resolve(target: str) -> Path:
    """Return the one cgroup that a target names.

    Raises: UsageError if there is none, or more than one.
    """
    found = resolve_all(target)
    if len(found) != 1:
        several = ", ".join(str(path) for path in found[:4])
        raise UsageError(
            f"{target} names {len(found)} cgroups: {several}", hint="name one of them by its path"
        )
    return found[0]


def resolve_all(target: str) -> list[Path]:
    """Return the cgroups that a target names. Raises: UsageError if there is none."""
    try:
        found = find(checked(target))
    except ValueError as error:
        raise UsageError(str(error), hint=usage()) from error
    if not found:
        if target.startswith(container_targets.KINDS):
            raise UsageError(container_targets.absence(target), hint=usage())
        if is_pattern(target):
            raise UsageError(
                f"{target} is not running",
                hint="`systemd-cgls` shows the names of running units; a unit such as Debian's "
                "postgresql.service only starts others (postgresql@15-main)",
            )
        raise UsageError(f"{target} is not a cgroup", hint=usage())
    return found


def usage() -> str:
    """Return how targets are written."""
    return f"use a path below {root()}, {KINDS}"


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
        hint = ""
        if isinstance(error, PermissionError):
            hint = "run it as root"
        elif error.errno == errno.EBUSY:
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
