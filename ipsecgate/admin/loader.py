"""Change what is pinned: load, attach, detach, unload. One writer at a time."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ipsecgate.core.state.floor import tag_of
from ipsecgate.edges.bpf import bytecode, libbpf
from ipsecgate.edges.bpf.objects import opened
from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.edges.host import cgroups
from ipsecgate.edges.host.config import Config
from ipsecgate.edges.kernel import floor
from ipsecgate.errors import GateError, KernelLacksError, UsageError
from ipsecgate.lock import held
from ipsecgate.paths import Paths


def pins_of(paths: Paths) -> Pins:
    """Return an instance's pins, whether there are any or not."""
    return Pins(paths.bpffs, paths.instance)


def gated(paths: Paths) -> list[Path]:
    """Return the gated cgroups that there still are."""
    found = cgroups.by_id()
    ids = {attachment.cgroup_id for attachment in pins_of(paths).attachments()}
    return [found[one] for one in sorted(ids) if one in found]


def is_gated(paths: Paths, pid: int) -> bool:
    """Tell whether a process is in a gated cgroup, or one below. Raises: OSError."""
    return any(map(cgroups.of(pid).is_relative_to, gated(paths)))


@contextmanager
def _writing(paths: Paths, what: str) -> Iterator[Pins]:
    """Lock the instance; turn what the kernel refuses into what to do about it."""
    with held(paths.lock, wait=True, busy="another ipsecgate is changing this instance"):
        try:
            yield pins_of(paths)
        except OSError as error:
            if error.errno == errno.EPERM:
                raise GateError(f"{what}: {error.strerror}", hint="run it as root") from error
            if error.errno in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise KernelLacksError(
                    f"{what}: {error.strerror}", hint="`ipsecgate check` says what is missing"
                ) from error
            raise GateError(f"{what}: {error.strerror or error}") from error


def load(paths: Paths) -> None:
    """Pin maps and programs of this version; new pins refuse, old ones are taken over.

    Where another version with other maps is in force it stays so until `switch`.
    """
    code = bytecode.get(paths.cache)
    with _writing(paths, "load") as pins:
        pins.load(code)
        _complete(pins)


def switch(paths: Paths) -> None:
    """Put a version in force that was loaded beside another one, now that its tables are in."""
    with _writing(paths, "switch versions") as pins:
        pins.switch()
        _complete(pins)


def _complete(pins: Pins) -> None:
    """Attach the hooks that the version before did not have."""
    gated, folders = {a.cgroup_id for a in pins.attachments()}, cgroups.by_id()
    for cgroup in filter(None, map(folders.get, gated)):
        pins.attach(cgroup)


def unload(paths: Paths, *, force: bool) -> None:
    """Remove the pins. With cgroups attached that opens the gate: only by force."""
    with _writing(paths, "unload") as pins:
        gated = {a.cgroup_id for a in pins.attachments()}
        if gated and not force:
            raise GateError(
                f"{len(gated)} cgroup(s) are gated; unloading would open the gate",
                hint="`ipsecgate detach` them first, or `ipsecgate unload --force`",
            )
        pins.unload()
    asyncio.run(floor.keep(tag_of(paths.instance), ()))


def attach(paths: Paths, target: str) -> Path:
    """Gate a cgroup, return its path."""
    cgroup = cgroups.resolve(target)
    attach_path(paths, cgroup)
    return cgroup


def attach_all(paths: Paths, targets: Iterable[str]) -> list[Path]:
    """Gate what is named and exists, return the cgroups."""
    found = [cgroup for target in targets for cgroup in cgroups.find(target)]
    for cgroup in found:
        attach_path(paths, cgroup)
    return found


def attach_path(paths: Paths, cgroup: Path) -> None:
    """Gate one cgroup."""
    with _writing(paths, f"attach {cgroup}") as pins:
        pins.attach(cgroup)


def prune(paths: Paths) -> set[int]:
    """Remove the pins of cgroups that are gone for good, return the ids of all others.

    A removed cgroup lives on in the sockets that were made in it, wherever they are now; the
    kernel lets go of its links when the last one is closed.
    """
    left = set()
    with _writing(paths, "prune") as pins:
        for path in sorted((pins.root / "links").glob("*")):
            with opened(libbpf.open_pin(path)) as link:
                gone = libbpf.link_info(link).cgroup_id == 0
            if gone:
                path.unlink()
            else:
                left.add(int(path.name.rpartition("-")[2]))
    return left


def check_targets(paths: Paths, config: Config) -> tuple[str, ...]:
    """Return the targets of a configuration. Raises: UsageError for one that can never be."""
    root = cgroups.root()
    for target in config.cgroups:
        if not cgroups.is_pattern(target) and not Path(target).is_relative_to(root):
            raise UsageError(
                f"{paths.config}: gate.cgroups: {target} is not below {root}",
                hint="a path there, unit:NAME or container:ID",
            )
    return (str(root),) if config.host else config.cgroups


def gated_ids(paths: Paths) -> set[int]:
    """Return the ids of the gated cgroups and of all below them."""
    attached = {a.cgroup_id for a in pins_of(paths).attachments()}
    by_id = cgroups.by_id()
    tops = [by_id[one] for one in attached if one in by_id]
    return {one for one, path in by_id.items() if any(path.is_relative_to(top) for top in tops)}


def detach(paths: Paths, target: str) -> str:
    """Ungate a cgroup: a target as for attach, or the id of one that was removed."""
    cgroup_id = int(target) if target.isdigit() else cgroups.resolve(target).stat().st_ino
    with _writing(paths, f"detach {target}") as pins:
        if not pins.detach(cgroup_id):
            raise GateError(f"{target} is not gated by instance {paths.instance!r}")
    return target
