"""Tells which processes in gated cgroups are in other network namespaces, as soon as they come.

A container's first call would be refused if its namespace were followed only then. A runtime makes
the cgroup, moves a process into it, lets it enter its namespace, and executes the program last.
So a process is looked at several times.

Rule of this module: missing one opens nothing. Its first call is refused, which reports it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from ipsecgate.admin import loader
from ipsecgate.edges.host import cgroups
from ipsecgate.edges.host.inotify import Appeared, Arrivals, Folders, Overflow, Populated
from ipsecgate.edges.kernel.namespaces import inode
from ipsecgate.paths import Paths

log = logging.getLogger("ipsecgate")

PAUSE = 0.05  # seconds
POLL = 2.0  # seconds between looks without inotify
LOOKS = (0.0, 0.005, 0.02, 0.05, 0.2, 1.0)  # seconds after a process came into a cgroup

Deliver = Callable[[int], None]
"""Receives a process in another namespace than ours. The same namespace may be told repeatedly."""


class Newcomers:
    """Watches the gated cgroups of an instance. Blocking work runs in a thread."""

    def __init__(self, paths: Paths, deliver: Deliver) -> None:
        self._paths = paths
        self._deliver = deliver
        self._own = inode(os.getpid())
        self._gated: frozenset[Path] = frozenset()
        self._links_changed = False
        self._wake = asyncio.Event()
        self._looking: dict[Path, asyncio.Task[None]] = {}

    def processes(self) -> list[int]:
        """Return the gated processes. Blocks."""
        gated = self._gated or self._read_gated()  # at the start
        return [pid for cgroup in gated for pid in cgroups.processes(cgroup)]

    async def run(self) -> None:
        """Watch until cancelled, or look again and again where inotify fails."""
        loop = asyncio.get_running_loop()
        try:
            links = Arrivals(loader.pins_of(self._paths).root / "links", gone=True)
        except OSError as error:
            log.warning("inotify fails, so containers are noticed every %.0f s: %s", POLL, error)
            await self._poll()
            return
        loop.add_reader(links.fd, self._on_links, links)
        try:
            while True:
                self._gated = await asyncio.to_thread(self._read_gated)
                folders = await self._open()
                try:
                    for cgroup in self._gated:
                        self._look(cgroup)
                    await self._watch(folders)
                finally:
                    if folders is not None:
                        loop.remove_reader(folders.fd)
                        folders.close()
        finally:
            loop.remove_reader(links.fd)
            links.close()

    async def _poll(self) -> None:
        while True:
            self._gated = await asyncio.to_thread(self._read_gated)
            for cgroup in self._gated:
                self._look(cgroup)
            await asyncio.sleep(POLL)

    def _on_links(self, links: Arrivals) -> None:
        """A hook was attached or detached, by us or by somebody else."""
        links.clear()
        self._links_changed = True
        self._wake.set()

    def _read_gated(self) -> frozenset[Path]:
        try:
            return frozenset(loader.gated_cgroups(self._paths))
        except OSError as error:
            log.warning("cannot list the gated cgroups: %s", error)
            return self._gated

    async def _open(self) -> Folders | None:
        if not self._gated:
            return None
        try:
            return await asyncio.to_thread(
                Folders, cgroups.root(), self._is_on_the_way, population=True
            )
        except OSError as error:
            log.warning("inotify fails, so new containers are noticed late: %s", error)
            return None

    def _is_on_the_way(self, folder: Path) -> bool:
        return any(
            folder.is_relative_to(cgroup) or cgroup.is_relative_to(folder) for cgroup in self._gated
        )

    async def _watch(self, folders: Folders | None) -> None:
        """Act on notifications; return when other cgroups are gated, or notifications were lost."""
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            if folders is not None:
                loop.add_reader(folders.fd, self._on_readable, folders.fd)
            await self._wake.wait()
            if folders is not None and not self._take(folders):
                return
            if self._links_changed:
                await asyncio.sleep(PAUSE)  # a cgroup gets several hooks
                self._links_changed = False
                if await asyncio.to_thread(self._read_gated) != self._gated:
                    return

    def _on_readable(self, fd: int) -> None:
        asyncio.get_running_loop().remove_reader(fd)  # until it has been read
        self._wake.set()

    def _take(self, folders: Folders) -> bool:
        try:
            for event in folders.events():
                match event:
                    case Overflow():
                        return False
                    case Appeared(path) | Populated(path):
                        if any(path.is_relative_to(cgroup) for cgroup in self._gated):
                            self._look(path)
        except OSError as error:
            log.warning("cannot follow cgroups: %s", error)
            return False
        return True

    def _look(self, cgroup: Path) -> None:
        """Look at the processes of a cgroup, now and a few times more."""
        before = self._looking.get(cgroup)
        if before is not None:
            before.cancel()
        task = asyncio.get_running_loop().create_task(self._look_repeatedly(cgroup))
        self._looking[cgroup] = task
        task.add_done_callback(lambda done: self._forget(cgroup, done))

    def _forget(self, cgroup: Path, task: asyncio.Task[None]) -> None:
        if self._looking.get(cgroup) is task:
            del self._looking[cgroup]

    async def _look_repeatedly(self, cgroup: Path) -> None:
        waited = 0.0
        for moment in LOOKS:
            await asyncio.sleep(moment - waited)
            waited = moment
            for pid in await asyncio.to_thread(self._elsewhere, cgroups.processes(cgroup)):
                self._deliver(pid)

    def _elsewhere(self, pids: Iterable[int]) -> list[int]:
        """Return one process for each namespace other than ours."""
        found: dict[int, int] = {}
        for pid in pids:
            number = inode(pid)
            if number is not None and number != self._own:
                found.setdefault(number, pid)
        return list(found.values())
