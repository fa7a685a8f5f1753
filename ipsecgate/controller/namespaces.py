"""Follows the network namespaces of gated processes: where their packets go, while there are any.

    a gated process is seen, or refused, in a namespace that nobody follows
        --> open the namespace, resolve its paths, watch it
    something changed there, or here
        --> resolve again, and tell if the paths differ
    the last gated process has left it
        --> forget it, so that the kernel can remove it

Rules of this module: until the paths of a namespace are known, its flows are refused. At most
`MOST` namespaces are followed; the flows of others stay refused, and `errors` says so.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress

from ipsecgate.admin.status_document import Namespace as NamespaceDocument
from ipsecgate.controller.followed import Followed, reasons, watches
from ipsecgate.controller.newcomers import Newcomers
from ipsecgate.controller.other_instances import OtherInstances
from ipsecgate.core.codec.netlink import DecodeError
from ipsecgate.core.model.events import OriginGone, PathsResolved
from ipsecgate.core.model.flow import Network, Origin
from ipsecgate.core.model.prefixes import PrefixSet
from ipsecgate.core.model.problem import Problem
from ipsecgate.edges.kernel import namespaces, ways_out
from ipsecgate.edges.kernel.here import NETLINK_ROUTE, Here, concerns, read_here
from ipsecgate.edges.kernel.namespaces import Namespace
from ipsecgate.edges.kernel.netlink import RawNetlinkSocket
from ipsecgate.edges.kernel.routes import GROUPS
from ipsecgate.paths import Paths

log = logging.getLogger("ipsecgate")

MOST = 1000
PAUSE = 0.02  # seconds; changes that follow each other are handled together


class Namespaces:
    """Follows other namespaces than this one; `deliver` gets what it finds out."""

    def __init__(
        self, paths: Paths, own: int, deliver: Callable[[PathsResolved | OriginGone], None]
    ) -> None:
        """`own`: the cookie of the gate's namespace."""
        self._own = own
        self._instances = OtherInstances(paths)
        self._deliver = deliver
        self._newcomers = Newcomers(paths, self._on_newcomer)
        self._followed: dict[int, Followed] = {}  # by cookie
        self._known: dict[int, int] = {}  # cookie by number in nsfs, of those followed
        self._asked: dict[int, tuple[int, set[Origin]]] = {}  # by cookie: a process, and origins
        self._seen: dict[int, int] = {}  # newcomers: process by number of its namespace
        self._destinations: tuple[Network, ...] = ()
        self._is_told = False  # which; before, a predecessor's paths are in force
        self._covered = PrefixSet(())  # the same
        self._here: Here | None = None
        self._changes = 0  # here
        self._exited: set[int] = set()  # cookies of namespaces whose process has ended
        self._due = asyncio.Event()
        self._is_full = False
        self._denied = ""
        self._has_floor = False

    @property
    def errors(self) -> list[Problem]:
        """Return the problems that the operator should fix."""
        refused = "what must be protected is refused there"
        found: list[Problem] = []
        if self._is_full:
            text = f"gated processes are in more than {MOST} other network namespaces"
            found.append(Problem(f"{text}: {refused}", "gate fewer cgroups on this host"))
        if self._denied:
            text = f"cannot enter the network namespaces of containers ({self._denied})"
            found.append(Problem(f"{text}: {refused}", "give the controller CAP_SYS_ADMIN"))
        return found

    def document(self) -> list[NamespaceDocument]:
        """Return the namespaces for the status document."""
        names = self._instances.names
        found: list[NamespaceDocument] = [
            {
                "pid": pid,
                "instance": names.get(cookie),
                "outside": reasons(item.origins.get(Origin(cookie))),
            }
            for cookie, item in self._followed.items()
            if (pid := self._process_now_in(item)) is not None
        ]
        for cookie in names.keys() - self._followed.keys():
            found.append({"pid": None, "instance": names[cookie], "outside": []})
        return found

    def follow(self, destinations: Iterable[Network]) -> None:
        """Replace the destinations to resolve, in every namespace."""
        self._destinations = tuple(destinations)
        self._covered = PrefixSet(self._destinations)
        self._is_told = True
        for item in self._followed.values():
            item.origins = dict.fromkeys(item.origins)  # deliver all of them again
        self.changed()

    def set_floor(self, *, in_force: bool) -> None:
        """Tell whether the host floor is in force."""
        if in_force != self._has_floor:
            self._has_floor = in_force
            self.changed()

    def want(self, origin: Origin, pid: int) -> None:
        """Follow an origin in another namespace. `pid`: a process there, perhaps."""
        item = self._followed.get(origin.netns)
        if item is None:
            self._asked.setdefault(origin.netns, (pid, set()))[1].add(origin)
        elif origin not in item.origins:
            item.origins[origin] = None
            item.is_due = True
        self._due.set()

    async def run(self) -> None:
        """Follow until cancelled. Raises: OSError, DecodeError if this namespace can't be read."""
        here = RawNetlinkSocket(NETLINK_ROUTE, self._on_change_here, lambda _: self.changed())
        try:
            here.join(GROUPS)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._newcomers.run())
                tasks.create_task(self._work())
                tasks.create_task(self._instances.run())
        finally:
            here.close()
            for cookie in list(self._followed):
                self._close(cookie)

    async def _work(self) -> None:
        while True:
            await self._due.wait()
            self._due.clear()
            await self._take_news()
            if not self._is_told:
                continue
            await self._compare_here()
            for cookie, item in list(self._followed.items()):
                if item.is_due and self._followed.get(cookie) is item:
                    await self._resolve(cookie, item)
                    await self._take_news()  # new ones need not wait for the rest
            await asyncio.sleep(PAUSE)

    # --- namespaces that come and go ----------------------------------------------------

    def _on_newcomer(self, pid: int) -> None:
        number = namespaces.inode(pid)
        if number is not None and number not in self._known:
            self._seen[number] = pid
            self._due.set()

    async def _take_news(self) -> None:
        while self._exited:
            await self._find_another(self._exited.pop())
        while self._seen:
            number, pid = self._seen.popitem()
            if number not in self._known:
                try:
                    await self._add(Namespace.of_thread(pid), pid)
                except PermissionError as error:
                    self._denied = error.strerror or str(error)
                except OSError:
                    pass  # the process has ended
        while self._asked:
            cookie, (pid, origins) = self._asked.popitem()
            if cookie not in self._followed:
                found = await asyncio.to_thread(self._find, cookie, pid)
                if found is not None:
                    await self._add(*found)
            for origin in origins:
                if cookie in self._followed:
                    self.want(origin, pid)
                else:  # a predecessor may have left its paths
                    self._deliver(OriginGone(origin))

    def _find(self, cookie: int, pid: int) -> tuple[Namespace, int] | None:
        """Return the namespace with a cookie, and a gated process in it. Blocks."""
        first = [pid] if pid else []
        try:
            return namespaces.find(cookie, [*first, *self._newcomers.processes()])
        except PermissionError as error:
            self._denied = error.strerror or str(error)
            return None

    async def _add(self, namespace: Namespace, pid: int) -> None:
        """Follow a namespace; resolve its paths first of all."""
        if namespace.cookie == self._own or namespace.cookie in self._followed:
            namespace.close()
            return
        self._is_full = len(self._followed) >= MOST
        if self._is_full:
            namespace.close()
            return
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            namespace.close()  # whoever comes next is refused, and reported
            return
        cookie = namespace.cookie
        watching = watches(namespace, lambda _: self._on_change_there(cookie))
        item = Followed(namespace, pid, pidfd, watching, {Origin(cookie): None})
        self._followed[cookie] = item
        self._known[namespace.inode] = cookie
        asyncio.get_running_loop().add_reader(pidfd, self._on_exit, cookie)
        log.info("following the network namespace of process %d", pid)
        await self._resolve(cookie, item)

    def _on_exit(self, cookie: int) -> None:
        asyncio.get_running_loop().remove_reader(self._followed[cookie].pidfd)
        self._exited.add(cookie)
        self._due.set()

    async def _find_another(self, cookie: int) -> None:
        """The process that stood for a namespace has ended: let another do so, or forget it."""
        item = self._followed.get(cookie)
        if item is None:
            return
        number = item.namespace.inode
        while (pid := await asyncio.to_thread(self._process_in, number)) is not None:
            with suppress(OSError):  # it has ended, too
                pidfd = os.pidfd_open(pid)
                if namespaces.inode(pid) != number:
                    os.close(pidfd)
                    continue
                os.close(item.pidfd)
                item.pid, item.pidfd = pid, pidfd
                asyncio.get_running_loop().add_reader(pidfd, self._on_exit, cookie)
                return
        self._forget(cookie)

    def _process_now_in(self, item: Followed) -> int | None:
        """Return a gated process that is in a namespace, None if all have left it.

        It is followed all the same while the first one lives, which may have sockets there.
        """
        number = item.namespace.inode
        return item.pid if namespaces.inode(item.pid) == number else self._process_in(number)

    def _process_in(self, number: int) -> int | None:
        pids = self._newcomers.processes()
        return next((pid for pid in pids if namespaces.inode(pid) == number), None)

    def _forget(self, cookie: int) -> None:
        for origin in self._followed[cookie].origins:
            self._deliver(OriginGone(origin))
        self._close(cookie)
        self._is_full = False

    def _close(self, cookie: int) -> None:
        item = self._followed.pop(cookie)
        self._known.pop(item.namespace.inode, None)
        asyncio.get_running_loop().remove_reader(item.pidfd)
        os.close(item.pidfd)
        for watch in item.watches:
            watch.close()
        item.namespace.close()

    # --- what changes -------------------------------------------------------------------

    def changed(self) -> None:
        """Something has changed here that may concern every namespace."""
        for item in self._followed.values():
            item.is_due = True
        self.look()

    def look(self) -> None:
        """Something has changed here: links, addresses, or rules that translate them."""
        self._here = None
        self._changes += 1
        self._due.set()

    def _on_change_here(self, datagram: bytes) -> None:
        if concerns(datagram, self._covered):
            self.changed()
        else:
            self.look()

    async def _compare_here(self) -> None:
        """Resolve again where something makes a difference that has changed here.

        Most of what happens here concerns the links of one container.
        """
        if self._here is not None or not self._followed:
            return
        try:
            here = await self._read_here()
        except (OSError, DecodeError):
            self.changed()  # to be logged
            return
        for item in self._followed.values():
            if item.here is None or item.here.differs(here, item.used):
                item.is_due = True

    def _on_change_there(self, cookie: int) -> None:
        if cookie in self._followed:
            self._followed[cookie].is_due = True
            self._due.set()

    async def _resolve(self, cookie: int, item: Followed) -> None:
        """Resolve the paths of a namespace, and deliver those that differ."""
        item.is_due = False
        try:
            here = self._here or await self._read_here()
            found = {
                origin: await ways_out.paths(
                    item.namespace, origin, self._destinations, here, floor=self._has_floor
                )
                for origin in list(item.origins)
            }
        except (OSError, DecodeError) as error:
            log.warning("cannot read the routes of process %d: %s", item.pid, error)
            if self._followed.get(cookie) is item:
                self._forget(cookie)
            return
        if self._followed.get(cookie) is not item:
            return
        item.here, item.used = here, found[Origin(cookie)].used
        for origin, one in found.items():
            resolved = PathsResolved(one.paths, origin)
            if item.origins.get(origin) != resolved:
                item.origins[origin] = resolved
                self._deliver(resolved)

    async def _read_here(self) -> Here:
        changes = self._changes
        here = await read_here(self._destinations)
        if self._changes == changes:
            self._here = here
        return here
