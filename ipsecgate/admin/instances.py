"""Several instances on one host, one for each network namespace, under one cgroup tree.

Each knows the SPD of its own namespace. So an instance leaves the flows of another's namespace to
that one (the map `others`), if its hooks are attached wherever ours are: then they are asked about
every call that ours are asked about.

Rules of this module: every change of `others`, and every attaching and detaching, happens under one
lock. Before a hook is attached where another instance's is not, and before one of the other's is
detached, the entry is removed. So in doubt, both instances judge a flow, and either can refuse it.
"""

from __future__ import annotations

import fcntl
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ipsecgate.core.tables.layout import INDEX, LAYOUT, SETTING, Setting
from ipsecgate.edges.bpf import elements, libbpf
from ipsecgate.edges.bpf.libbpf import closing_fd
from ipsecgate.edges.bpf.objects import HOOKS
from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.edges.host import cgroups

LEFT = b"\1"


@contextmanager
def locked(pins: Pins) -> Iterator[None]:
    """Keep every other instance from attaching, detaching, and changing `others` meanwhile.

    Raises: OSError.
    """
    try:
        fd = os.open(pins.root.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield  # no instance is loaded
        return
    with closing_fd(fd) as folder:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield


def is_beside_others(pins: Pins) -> bool:
    """Tell whether another instance is loaded, or its flows were left to it. Raises: OSError."""
    if any(path != pins.root for path in pins.root.parent.iterdir()):
        return True
    with closing_fd(pins.current.open_map("others")) as fd:
        return any(True for _ in elements.keys(fd, SETTING.size))


def refresh(pins: Pins, adding: Path | None = None) -> dict[int, str]:
    """Leave the namespaces to other instances to which that is safe; return them by cookie.

    `adding`: a cgroup that this instance is about to attach to. Call it under the lock.
    Raises: OSError.
    """
    if not (pins.current.maps / "others").exists():
        return {}  # not loaded, or an older version is in force
    found: dict[int, str] = {}
    if beside := _beside(pins):
        mine, paths = _attached(pins), cgroups.by_id()
        if adding is not None:
            mine[adding.stat().st_ino] = set(HOOKS)
        for other in beside:
            cookie = _namespace(other)
            if cookie and mine and _covers(_attached(other), mine, paths):
                found[cookie] = other.root.name
    with closing_fd(pins.current.open_map("others")) as fd:
        before = {_unpack(key) for key in elements.keys(fd, SETTING.size)}
        for cookie in before - found.keys():
            elements.delete(fd, SETTING.pack(cookie))
        for cookie in found.keys() - before:
            elements.update(fd, SETTING.pack(cookie), LEFT)
    return found


def withdraw(pins: Pins) -> None:
    """Have every other instance judge the flows of this one's namespace. Call it under the lock.

    Raises: OSError.
    """
    cookie = _namespace(pins)
    for other in _beside(pins) if cookie else ():
        with suppress(FileNotFoundError), closing_fd(other.current.open_map("others")) as fd:
            elements.delete(fd, SETTING.pack(cookie))


def judge_of(pins: Pins, cookie: int) -> str:
    """Return the name of the other instance in a network namespace, "" if there is none."""
    found = (other.root.name for other in _beside(pins) if _namespace(other) == cookie)
    return next(found, "")


def _beside(pins: Pins) -> list[Pins]:
    """Return the other instances of this version."""
    folder = pins.root.parent
    names = [path.name for path in sorted(folder.iterdir()) if path != pins.root]
    found = [Pins(pins.bpffs, name) for name in names]
    return [other for other in found if _setting(other, Setting.VERSION) == LAYOUT]


def _namespace(pins: Pins) -> int:
    """Return the cookie of an instance's network namespace, 0: it never had a controller."""
    return _setting(pins, Setting.NETNS)


def _setting(pins: Pins, which: Setting) -> int:
    try:
        with closing_fd(pins.current.open_map("settings")) as fd:
            raw = elements.lookup(fd, INDEX.pack(which), SETTING.size)
    except FileNotFoundError:
        return 0
    return _unpack(raw) if raw else 0


def _unpack(raw: bytes) -> int:
    value: int = SETTING.unpack(raw)[0]
    return value


def _attached(pins: Pins) -> dict[int, set[str]]:
    """Return the hooks that are attached to each cgroup, by its id."""
    found: dict[int, set[str]] = defaultdict(set)
    for path in (pins.root / "links").glob("*"):
        hook, _, number = path.name.partition("-")
        with suppress(FileNotFoundError), closing_fd(libbpf.open_pin(path)) as link:
            # 0: the kernel has detached it, because the cgroup is gone with all its sockets.
            if libbpf.link_info(link).cgroup_id:
                found[int(number)].add(hook)
    return found


def _covers(
    theirs: Mapping[int, set[str]], mine: Mapping[int, set[str]], paths: Mapping[int, Path]
) -> bool:
    """Tell whether their hooks are asked wherever mine are.

    Of a removed cgroup, which lives on in its sockets, the path is not known any more.
    """
    whole = {number for number, hooks in theirs.items() if hooks >= HOOKS.keys()}
    tops = [paths[number] for number in whole if number in paths]
    return all(
        number in whole
        or (number in paths and any(paths[number].is_relative_to(top) for top in tops))
        for number in mine
    )
