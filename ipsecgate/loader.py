"""Change what is pinned: load, attach, detach, unload. One writer at a time."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ipsecgate.edges import bytecode, cgroups
from ipsecgate.edges.config import Config
from ipsecgate.edges.pins import Pins
from ipsecgate.errors import GateError, KernelLacksError
from ipsecgate.lock import held
from ipsecgate.paths import Paths


def pins_of(paths: Paths) -> Pins:
    """Return an instance's pins, whether there are any or not."""
    return Pins(paths.bpffs, paths.instance)


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
    """Pin maps and programs of this version; new pins refuse, old ones are taken over."""
    code = bytecode.get(paths.cache)
    with _writing(paths, "load") as pins:
        pins.load(code)


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


def attach(paths: Paths, target: str) -> Path:
    """Gate a cgroup, return its path."""
    cgroup = cgroups.resolve(target)
    attach_path(paths, cgroup)
    return cgroup


def attach_all(paths: Paths, config: Config) -> list[Path]:
    """Gate what the configuration names and exists, return the cgroups."""
    targets = [str(cgroups.root())] if config.host else config.cgroups
    found = [cgroup for target in targets for cgroup in cgroups.find(target)]
    for cgroup in found:
        attach_path(paths, cgroup)
    return found


def attach_path(paths: Paths, cgroup: Path) -> None:
    """Gate one cgroup."""
    with _writing(paths, f"attach {cgroup}") as pins:
        pins.attach(cgroup)


def detach(paths: Paths, target: str) -> str:
    """Ungate a cgroup: a target as for attach, or the id of one that was removed."""
    cgroup_id = int(target) if target.isdigit() else cgroups.resolve(target).stat().st_ino
    with _writing(paths, f"detach {target}") as pins:
        if not pins.detach(cgroup_id):
            raise GateError(f"{target} is not gated by instance {paths.instance!r}")
    return target
