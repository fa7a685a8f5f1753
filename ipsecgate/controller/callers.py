"""Whose a refused flow is: the cgroup of its process, and the unit or container of that.

A cgroup is looked up once. While its process lives, /proc says at once where it is; else, and for
the name of a container, a thread looks.

Rules of this module: a refusal waits for its caller's name at most `PAUSE` seconds and a look at
the host, and its order among those of the same cgroup stays. If too many wait, they go without.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ipsecgate.core.model.events import FlowRefused
from ipsecgate.edges.host import cgroups, runtimes
from ipsecgate.errors import GateError

KEPT = 1024  # cgroups
WAITING = 256  # refusals
PAUSE = 0.5  # seconds between two looks
SHOWN = 12  # digits of a container's id, if it has no name


class Caller(NamedTuple):
    """A cgroup's path, the systemd unit and the container that it belongs to; "": none, unknown."""

    cgroup: str = ""
    unit: str = ""
    container: str = ""


NOBODY = Caller()


class Callers:
    """Passes on refusals, each with its caller."""

    def __init__(self, deliver: Callable[[FlowRefused, Caller], None]) -> None:
        self._deliver = deliver
        self._known: dict[int, Caller] = {}
        self._waiting: list[FlowRefused] = []
        self._wake = asyncio.Event()

    def put(self, refusal: FlowRefused) -> None:
        """Pass on a refusal, now or when its caller is known."""
        caller = self.known(refusal.cgroup, refusal.pid)
        if caller is not None:
            self._deliver(refusal, caller)
        elif len(self._waiting) >= WAITING:
            self._deliver(refusal, NOBODY)
        else:
            self._waiting.append(refusal)
            self._wake.set()

    def known(self, cgroup: int, pid: int) -> Caller | None:
        """Return a caller, None if it takes longer to find out. `pid`: one there, 0: unknown."""
        caller = self._known.get(cgroup) if cgroup else NOBODY
        if caller is None and pid:
            path = _path_of(cgroup, pid)
            if path is not None and not cgroups.container_in(path):
                caller = self._keep(cgroup, Caller(str(path), cgroups.unit_in(path)))
        return caller

    async def run(self) -> None:
        """Look up the callers of the refusals that wait."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            wanted = {one.cgroup for one in self._waiting}
            found = await asyncio.to_thread(look, wanted)
            for cgroup in wanted:
                self._keep(cgroup, found.get(cgroup, NOBODY))
            waiting, self._waiting = self._waiting, []
            for refusal in waiting:
                self.put(refusal)
            await asyncio.sleep(PAUSE)

    def _keep(self, cgroup: int, caller: Caller) -> Caller:
        if len(self._known) >= KEPT:
            del self._known[next(iter(self._known))]
        self._known[cgroup] = caller
        return caller


def _path_of(cgroup: int, pid: int) -> Path | None:
    """Return the cgroup of a process if it has this id; another may have the pid by now."""
    try:
        path = cgroups.of_process(pid)
        return path if path.stat().st_ino == cgroup else None
    except (OSError, GateError):
        return None


def look(wanted: Iterable[int]) -> dict[int, Caller]:
    """Return the callers in these cgroups, without those that are gone. Blocks."""
    paths = cgroups.by_id()
    here = {number: paths[number] for number in wanted if number in paths}
    containers = {number: cgroups.container_in(path) for number, path in here.items()}
    names = runtimes.names(filter(None, containers.values()))
    return {
        number: Caller(str(path), cgroups.unit_in(path), _name(containers[number], names))
        for number, path in here.items()
    }


def _name(ident: str, names: Mapping[str, set[str]]) -> str:
    return min(names.get(ident, ()), default=ident[:SHOWN])
