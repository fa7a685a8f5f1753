"""Change what is pinned: load, attach, detach, unload. A file lock allows one writer at a time."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ipsecgate.admin import instances
from ipsecgate.edges.bpf import libbpf
from ipsecgate.edges.bpf.libbpf import closing_fd
from ipsecgate.edges.bpf.order import Later, later
from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.edges.host import cgroups
from ipsecgate.edges.host.config import Config
from ipsecgate.errors import GateError, KernelLacksError, UsageError
from ipsecgate.lock import held
from ipsecgate.paths import Paths


def pins_of(paths: Paths) -> Pins:
    """Return an instance's pins, which may not exist."""
    return Pins(paths.bpffs, paths.instance)


def gated_cgroups(paths: Paths) -> list[Path]:
    """Return the gated cgroups that still exist."""
    paths_by_id = cgroups.by_id()
    ids = {attachment.cgroup_id for attachment in pins_of(paths).attachments()}
    return [paths_by_id[number] for number in sorted(ids) if number in paths_by_id]


def is_gated(paths: Paths, pid: int) -> bool:
    """Return whether a process is in a gated cgroup, or below one. Raises: OSError."""
    return any(map(cgroups.of_process(pid).is_relative_to, gated_cgroups(paths)))


def gated_ids(paths: Paths) -> set[int]:
    """Return the ids of the gated cgroups and of all cgroups below them."""
    attached = {attachment.cgroup_id for attachment in pins_of(paths).attachments()}
    paths_by_id = cgroups.by_id()
    tops = [paths_by_id[number] for number in attached if number in paths_by_id]
    return {
        number
        for number, path in paths_by_id.items()
        if any(path.is_relative_to(top) for top in tops)
    }


@contextmanager
def _locked(paths: Paths, action: str) -> Iterator[Pins]:
    """Hold the instance's lock, and turn an OSError into a GateError with a hint."""
    with held(paths.lock, wait=True, busy="another ipsecgate is changing this instance"):
        try:
            yield pins_of(paths)
        except OSError as error:
            if error.errno == errno.EPERM:
                hint = "run it as root, with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"
                raise GateError(f"{action}: {error.strerror}", hint=hint) from error
            if error.errno in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise KernelLacksError(
                    f"{action}: {error.strerror}",
                    hint="`ipsecgate check` shows what the kernel lacks",
                ) from error
            raise GateError(f"{action}: {error.strerror or error}") from error


def load(paths: Paths, *, audit: bool = False) -> None:
    """Pin the maps and programs of this version, or take over those that are pinned.

    New pins refuse, or with `audit` only count. If the pinned maps have another layout, that
    version stays in force until `switch`.
    """
    from ipsecgate.edges.bpf import bytecode  # noqa: PLC0415 - most verbs do not need it

    code = bytecode.get(paths.cache)
    with _locked(paths, "load") as pins:
        pins.load(code, audit=audit)
        with instances.locked(pins):
            _attach_missing_hooks(pins)


def switch(paths: Paths) -> None:
    """Put the version in force that `load` pinned beside another. Call it after publishing."""
    with _locked(paths, "switch versions") as pins:
        pins.switch()
        with instances.locked(pins):
            _attach_missing_hooks(pins)


def _attach_missing_hooks(pins: Pins) -> None:
    """Attach the hooks that the previous version did not have to every gated cgroup."""
    paths_by_id = cgroups.by_id()
    ids = {attachment.cgroup_id for attachment in pins.attachments()}
    for cgroup in filter(None, map(paths_by_id.get, ids)):
        pins.attach(cgroup)


def unload(paths: Paths, *, force: bool) -> None:
    """Remove the pins and the host floor. Raises: GateError if cgroups are gated and not `force`.

    Unloading opens the gate.
    """
    # These take 50 ms to import, and the other verbs do not need them.
    import asyncio  # noqa: PLC0415

    from ipsecgate.core.state.floor import instance_tag  # noqa: PLC0415
    from ipsecgate.edges.kernel import floor  # noqa: PLC0415

    with _locked(paths, "unload") as pins:
        gated = {attachment.cgroup_id for attachment in pins.attachments()}
        if gated and not force:
            cgroup = "1 cgroup is" if len(gated) == 1 else f"{len(gated)} cgroups are"
            raise GateError(
                f"{cgroup} gated, and unloading would open the gate",
                hint="first `ipsecgate detach` each, or use `ipsecgate unload --force`",
            )
        with instances.locked(pins):
            instances.withdraw(pins)
            pins.unload()
    asyncio.run(floor.keep(instance_tag(paths.instance), ()))


def attach(paths: Paths, target: str) -> list[Path]:
    """Gate the cgroups that a target names, and return their paths. Raises: UsageError if none."""
    found = cgroups.resolve_all(target)
    for cgroup in found:
        attach_path(paths, cgroup)
    return found


def attach_all(paths: Paths, targets: Iterable[str]) -> list[Path]:
    """Gate every existing cgroup that the targets name, and return their paths."""
    found = [cgroup for some in cgroups.find_all(targets).values() for cgroup in some]
    for cgroup in found:
        attach_path(paths, cgroup)
    return found


def attach_path(paths: Paths, cgroup: Path) -> None:
    """Gate one cgroup."""
    with _locked(paths, f"attach {cgroup}") as pins, instances.locked(pins):
        instances.refresh(pins, cgroup)
        pins.attach(cgroup)


def run_last(paths: Paths) -> list[Later]:
    """Have the hooks run after all other programs; return those after which they cannot run."""
    paths_by_id = cgroups.by_id()
    with _locked(paths, "look at other programs") as pins:
        attachments = pins.attachments()
        gated = {paths_by_id.get(one.cgroup_id) for one in attachments}
        for cgroup in sorted(filter(None, gated)):
            for hook in {one.hook for one in later(cgroup, attachments) if one.can_be_overtaken}:
                pins.move_last(cgroup, hook)
    return runs_before(paths)


def runs_before(paths: Paths) -> list[Later]:
    """Return the programs of other tools that run after the hooks of this instance."""
    attachments = pins_of(paths).attachments()
    found: list[Later] = []
    for cgroup in gated_cgroups(paths):
        with suppress(FileNotFoundError):  # it was removed meanwhile
            found += later(cgroup, attachments)
    return found


def detach(paths: Paths, target: str) -> str:
    """Stop gating cgroups: a target as for `attach`, or the id of a removed cgroup."""
    numbers = (
        [int(target)]
        if target.isdigit()
        else [path.stat().st_ino for path in cgroups.resolve_all(target)]
    )
    with _locked(paths, f"detach {target}") as pins, instances.locked(pins):
        instances.withdraw(pins)
        detached = [pins.detach(number) for number in numbers]
        if not any(detached):
            raise GateError(
                f"instance {paths.instance!r} does not gate {target}",
                hint="`ipsecgate status` lists the gated cgroups",
            )
    return target


def leave_to_others(paths: Paths) -> dict[int, str]:
    """Leave other namespaces to the instances that judge them; return their names by cookie."""
    if not instances.is_beside_others(pins_of(paths)):
        return {}
    with _locked(paths, "look for other instances") as pins, instances.locked(pins):
        return instances.refresh(pins)


def prune(paths: Paths) -> set[int]:
    """Remove the pins of cgroups that the kernel has released; return the ids of the others.

    A removed cgroup lives on in the sockets that were made in it. The kernel releases its links
    when the last of these sockets is closed.
    """
    left = set()
    with _locked(paths, "prune") as pins:
        for path in sorted((pins.root / "links").glob("*")):
            with closing_fd(libbpf.open_pin(path)) as link:
                released = libbpf.link_info(link).cgroup_id == 0
            if released:
                path.unlink()
            else:
                left.add(int(path.name.rpartition("-")[2]))
    return left


def check_targets(paths: Paths, config: Config) -> tuple[str, ...]:
    """Return the configured targets. Raises: UsageError for a path that cannot be a cgroup."""
    root = cgroups.root()
    for target in config.cgroups:
        if not cgroups.is_pattern(target) and not Path(target).is_relative_to(root):
            raise UsageError(
                f"{paths.config}: gate.cgroups: {target} is not below {root}",
                hint=cgroups.usage(),
            )
    return (str(root),) if config.host else config.cgroups
