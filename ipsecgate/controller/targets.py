"""Gates the cgroups that the configuration names, when they appear.

Rules of this module: a cgroup is ungated only after the configuration stops naming it, and after
everything else in a reload. The pins of a removed cgroup stay until the kernel frees it, because
sockets may outlive it. Cgroups that `attach` gated are left alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Set
from contextlib import suppress
from pathlib import Path

from ipsecgate.admin import loader
from ipsecgate.core.model.problem import Problem
from ipsecgate.core.model.value import value
from ipsecgate.edges.host import cgroups, saved_state
from ipsecgate.edges.host.container_targets import KINDS
from ipsecgate.edges.host.inotify import Appeared, Folders, Overflow, Vanished
from ipsecgate.edges.host.runtimes import Unread
from ipsecgate.errors import GateError
from ipsecgate.paths import Paths

log = logging.getLogger("ipsecgate")

POLL = 2.0  # seconds between scans without inotify, or after a failure


@value
class _Gated:
    """A gated cgroup: its id, and the targets that named it then.

    They are kept, because the name of a container is no longer known once that has ended.
    """

    number: int
    targets: frozenset[str]


class Targets:
    """Gates the cgroups that the configured targets name. Blocking work runs in a thread."""

    def __init__(self, paths: Paths, wanted: Iterable[str]) -> None:
        self._paths = paths
        self._root = cgroups.root()
        self.wanted = tuple(wanted)  # the targets in force
        self._saved: tuple[str, ...] | None = None  # the targets on disk
        self._gated: dict[Path, _Gated] = {}  # those that a target names
        self._errors: dict[Path, Problem] = {}
        self._removed: set[int] = set()  # ids of removed cgroups whose pins are still there
        self._wake = asyncio.Event()
        self._lock = asyncio.Lock()

    @property
    def errors(self) -> list[Problem]:
        """Return why targets are not gated."""
        found = {target for gated in tuple(self._gated.values()) for target in gated.targets}
        waiting = [target for target in self.wanted if target not in found]
        return [*map(_not_found, waiting), *self._errors.values()]

    async def scan(self) -> None:
        """Gate every cgroup that exists and that a target names."""
        async with self._lock:
            await asyncio.to_thread(self._scan)

    async def change(self, wanted: Iterable[str]) -> None:
        """Gate the cgroups that these targets name, then ungate those that they don't."""
        async with self._lock:
            self.wanted = tuple(wanted)
            await asyncio.to_thread(self._scan)
            await asyncio.to_thread(self._ungate)
        self._wake.set()  # to watch other folders

    async def run(self) -> None:
        """Gate cgroups as they appear, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            folders = await self._open()
            try:
                await self.scan()  # cgroups that appeared before the watch began
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
        """Act on notifications; return when the folders must be opened again."""
        wanted = self.wanted
        while self.wanted is wanted:
            if folders is not None:
                asyncio.get_running_loop().add_reader(folders.fd, self._on_readable, folders.fd)
            poll = folders is None or bool(self._errors)
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL if poll or self._removed else None):
                    await self._wake.wait()
            self._wake.clear()
            if poll:
                await self.scan()
            elif self._removed:
                async with self._lock:
                    await asyncio.to_thread(self._prune)
            if folders is not None and not await self._take(folders):
                return

    def _on_readable(self, fd: int) -> None:
        asyncio.get_running_loop().remove_reader(fd)  # until it has been read
        self._wake.set()

    async def _take(self, folders: Folders) -> bool:
        """Act on notifications; return False if some were lost."""
        try:
            for event in folders.events():
                match event:
                    case Overflow():
                        return False
                    case Appeared(path):
                        async with self._lock:
                            await asyncio.to_thread(self._appeared, path)
                    case Vanished(path) if path in self._gated:
                        await self.scan()
        except OSError as error:
            log.warning("cannot follow cgroups: %s", error)
            await asyncio.sleep(POLL)
            return False
        return True

    def _is_on_the_way(self, folder: Path) -> bool:
        """Tell whether a cgroup that a target names may appear inside this one."""
        return any(
            cgroups.is_pattern(target)
            or (Path(target) != folder and Path(target).is_relative_to(folder))
            for target in self.wanted
        )

    # --- in a thread, one at a time -----------------------------------------------------

    def _scan(self) -> None:
        for path, gated in list(self._gated.items()):
            if _id(path) != gated.number:
                del self._gated[path]
                self._removed.add(gated.number)
                log.info("cgroup removed: %s", path)
        self._errors = {}
        self._save()
        unread: Unread = {}
        for target, found in cgroups.find_all(self.wanted, unread).items():
            for path in found:
                self._gate(path, {target})
        self._report(unread)
        self._prune()

    def _appeared(self, path: Path) -> None:
        unread: Unread = {}
        for target, cgroup in cgroups.naming(path, self.wanted, unread):
            self._gate(cgroup, {target})
        self._report(unread)

    def _report(self, unread: Unread) -> None:
        """Report files that may be about a container that a target names."""
        for file, reason in unread.items():
            self._errors[file] = Problem(
                f"{file} cannot be read, so its container may be missed: {reason}",
                "mend the file, or start its container again",
            )
            log.error("%s", self._errors[file])

    def _save(self) -> None:
        if self._saved == self.wanted:
            return
        try:
            saved_state.save_targets(self._paths.targets, self.wanted)
        except OSError as error:
            log.warning("cannot write %s: %s", self._paths.targets, error.strerror or error)
        else:
            self._saved = self.wanted

    def _prune(self) -> None:
        """Remove the pins of removed cgroups; a failure opens nothing, so it is only logged."""
        try:
            self._removed &= loader.prune(self._paths)
        except (GateError, OSError) as error:
            log.warning("cannot remove the pins of removed cgroups: %s", error)

    def _gate(self, path: Path, targets: Set[str]) -> None:
        number, before = _id(path), self._gated.get(path)
        if number is None:
            return
        if before is not None and before.number == number:
            self._gated[path] = _Gated(number, before.targets | targets)
            return
        try:
            loader.attach_path(self._paths, path)
        except (GateError, OSError) as error:
            if _id(path) == number:
                self._errors[path] = _not_gated(path, error)
                log.error("%s", self._errors[path])
            return
        self._gated[path] = _Gated(number, frozenset(targets))
        log.info("gated: %s", path)

    def _ungate(self) -> None:
        for path, gated in list(self._gated.items()):
            if gated.targets.intersection(self.wanted):
                continue
            with suppress(GateError):  # somebody else has ungated it
                loader.detach(self._paths, str(gated.number))
            del self._gated[path]
            log.info("no longer gated: %s", path)


def _not_found(target: str) -> Problem:
    start = "it" if target.startswith(KINDS) else "the service that lives there"
    return Problem(
        f"{cgroups.absence(target)}: it will be gated when it appears",
        f"start {start}, or remove it from gate.cgroups",
    )


def _not_gated(path: Path, error: GateError | OSError) -> Problem:
    hint = error.hint if isinstance(error, GateError) else ""
    advice = hint or "`ipsecgate check` shows whose program is there"
    return Problem(f"cgroup {path} is not gated: {error}", advice)


def _id(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None
