"""The cgroups that the configuration names: gated when they appear, for as long as it does.

Rules of this module: nothing is ungated but what the configuration named and names no more, and
that last. A removed cgroup's pins go when the kernel has let go of it: sockets may outlive it.
What `attach` gated is left alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ipsecgate.admin import loader
from ipsecgate.edges.host import cgroups, saved_state
from ipsecgate.edges.host.inotify import Appeared, Folders, Overflow, Vanished
from ipsecgate.errors import GateError
from ipsecgate.paths import Paths

log = logging.getLogger("ipsecgate")

POLL = 2.0  # seconds between looks where inotify cannot tell, or where something failed


class Targets:
    """Gates what the configured targets name. Blocking work is done in a thread."""

    def __init__(self, paths: Paths, wanted: Iterable[str]) -> None:
        self._paths = paths
        self._root = cgroups.root()
        self._wanted = tuple(wanted)
        self._kept: tuple[str, ...] | None = None  # on disk
        self._gated: dict[Path, int] = {}  # because a target names them; their ids
        self._errors: dict[Path, str] = {}
        self._going: set[int] = set()  # removed cgroups whose pins are left
        self._again = asyncio.Event()
        self._turn = asyncio.Lock()

    @property
    def errors(self) -> list[str]:
        """What is named and not gated."""
        waiting = [
            f"cgroup {target} does not exist: it will be gated when it appears"
            for target in self._wanted
            if not any(cgroups.names(target, path) for path in tuple(self._gated))
        ]
        return [*waiting, *self._errors.values()]

    async def look(self) -> None:
        """Gate what is named and there."""
        async with self._turn:
            await asyncio.to_thread(self._look)

    async def follow(self, wanted: Iterable[str]) -> None:
        """Gate what these targets name, and then ungate what they do not name any more."""
        async with self._turn:
            self._wanted = tuple(wanted)
            await asyncio.to_thread(self._look)
            await asyncio.to_thread(self._ungate)
        self._again.set()  # other folders are to be watched

    async def run(self) -> None:
        """Follow the cgroups that come and go, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            self._again.clear()
            folders = await self._open()
            try:
                await self.look()  # what came before it was watched
                await self._watch(folders)
            finally:
                if folders is not None:
                    loop.remove_reader(folders.fd)
                    folders.close()

    async def _open(self) -> Folders | None:
        try:
            return await asyncio.to_thread(Folders, self._root, self._is_on_the_way)
        except OSError as error:
            log.warning(
                "inotify fails, so new cgroups are only found every %.0f s: %s", POLL, error
            )
            return None

    async def _watch(self, folders: Folders | None) -> None:
        """Take what is told; return when all is to be looked at anew."""
        wanted = self._wanted
        while self._wanted is wanted:
            if folders is not None:
                asyncio.get_running_loop().add_reader(folders.fd, self._on_news, folders.fd)
            look = folders is None or bool(self._errors)
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL if look or self._going else None):
                    await self._again.wait()
            self._again.clear()
            if look:
                await self.look()
            elif self._going:
                async with self._turn:
                    await asyncio.to_thread(self._prune)
            if folders is not None and not await self._take(folders):
                return

    def _on_news(self, fd: int) -> None:
        asyncio.get_running_loop().remove_reader(fd)  # until it was read
        self._again.set()

    async def _take(self, folders: Folders) -> bool:
        """Act on what happened; False: nobody knows all that did."""
        try:
            for news in folders.news():
                match news:
                    case Overflow():
                        return False
                    case Appeared(path) if any(cgroups.names(t, path) for t in self._wanted):
                        async with self._turn:
                            await asyncio.to_thread(self._gate, path)
                    case Vanished(path) if path in self._gated:
                        await self.look()
        except OSError as error:
            log.warning("cannot follow cgroups: %s", error)
            await asyncio.sleep(POLL)
            return False
        return True

    def _is_on_the_way(self, folder: Path) -> bool:
        """Tell whether a cgroup that is named may appear in this one."""
        return any(
            cgroups.is_pattern(target)
            or (Path(target) != folder and Path(target).is_relative_to(folder))
            for target in self._wanted
        )

    # --- in a thread, one at a time -----------------------------------------------------

    def _look(self) -> None:
        for path, number in list(self._gated.items()):
            if _id(path) != number:
                del self._gated[path]
                self._going.add(number)
                log.info("cgroup removed: %s", path)
        self._errors = {}
        self._keep()
        for target in self._wanted:
            for path in cgroups.find(target):
                self._gate(path)
        self._prune()

    def _keep(self) -> None:
        if self._kept == self._wanted:
            return
        try:
            saved_state.keep_targets(self._paths.targets, self._wanted)
        except OSError as error:
            log.warning("cannot write %s: %s", self._paths.targets, error.strerror or error)
        else:
            self._kept = self._wanted

    def _prune(self) -> None:
        """Tidy up; where that fails nothing is open, and nothing else must fail for it."""
        try:
            self._going &= loader.prune(self._paths)
        except (GateError, OSError) as error:
            log.warning("cannot remove the pins of removed cgroups: %s", error)

    def _gate(self, path: Path) -> None:
        number = _id(path)
        if number is None or self._gated.get(path) == number:
            return
        try:
            loader.attach_path(self._paths, path)
        except (GateError, OSError) as error:
            if _id(path) == number:
                self._errors[path] = f"cgroup {path} is not gated: {error}"
                log.error("%s", self._errors[path])
            return
        self._gated[path] = number
        log.info("gated: %s", path)

    def _ungate(self) -> None:
        for path, number in list(self._gated.items()):
            if any(cgroups.names(target, path) for target in self._wanted):
                continue
            with suppress(GateError):  # somebody else did
                loader.detach(self._paths, str(number))
            del self._gated[path]
            log.info("no longer gated: %s", path)


def _id(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None
