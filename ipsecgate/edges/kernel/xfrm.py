"""The kernel's SPD and SAD as a stream of events, over NETLINK_XFRM.

Rules of this module:
- What it delivers is one ordered story: a `KernelSnapshot` first, then every change since. When
  the story breaks (the socket's buffer ran over, bytes that can't be decoded, a flush, which
  doesn't say what it kept) it is told again from a new snapshot, without being asked.
- Join, then dump, then fold what was notified meanwhile into the dump.
- Dumps have a socket of their own: a notification carries the sequence number of the request
  that caused it, and on a shared socket one of them ends a foreign dump early.
- Never NETLINK_NO_ENOBUFS: losing silently is what it does. Never XFRMNLGRP_ACQUIRE: listening
  there makes the kernel install larval states where no IKE daemon runs.
- No decisions: which policy wins and which SA is good is for the core.

pyroute2 is the transport only; why, is said in `ipsecgate.edges.kernel.netlink`.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from ipsecgate.core.codec.netlink import DecodeError
from ipsecgate.core.codec.xfrm import decode, encode_policy_dump, encode_sa_dump
from ipsecgate.core.model.events import (
    KernelSnapshot,
    PoliciesFlushed,
    PolicySet,
    SaSet,
    SasFlushed,
    XfrmEvent,
)
from ipsecgate.core.state.replay import replay
from ipsecgate.edges.kernel.netlink import RECEIVE_BUFFER, RawNetlinkSocket, Requests
from ipsecgate.errors import GateError

NETLINK_XFRM = 6
GROUP_EXPIRE, GROUP_SA, GROUP_POLICY, GROUP_MIGRATE = 2, 3, 4, 7
GROUPS = (GROUP_EXPIRE, GROUP_SA, GROUP_POLICY, GROUP_MIGRATE)

_HINTS = {
    errno.EPERM: "run it as root: XFRM needs CAP_NET_ADMIN in this network namespace",
    errno.EPROTONOSUPPORT: "modprobe xfrm_user, or boot a kernel with CONFIG_XFRM_USER",
}


class XfrmError(GateError):
    """The kernel's IPsec databases can't be read; `errno` says why."""

    def __init__(self, code: int, doing: str) -> None:
        super().__init__(
            f"{doing}: {os.strerror(code)}",
            hint=_HINTS.get(code, "see the kernel's log (dmesg)"),
        )
        self.errno = code


@dataclass(frozen=True, slots=True)
class Overrun:
    """Notifications were lost; what was delivered so far is stale until the next snapshot."""

    cause: str


class XfrmMonitor:
    """Follow SPD and SAD of the network namespace that the monitor is opened in.

    `deliver` is called from the event loop, straight from the socket's callback, with the story
    that the module describes; an exception it raises ends `run`. `on_overrun` is told when the
    story broke. Nothing is delivered before the first `resync`, which `run` begins with.

        async with XfrmMonitor(deliver) as monitor:
            await monitor.run()
    """

    def __init__(
        self,
        deliver: Callable[[XfrmEvent | KernelSnapshot], None],
        on_overrun: Callable[[Overrun], None] = lambda _overrun: None,
        *,
        receive_buffer: int = RECEIVE_BUFFER,
    ) -> None:
        self.overruns = 0
        self._deliver = deliver
        self._on_overrun = on_overrun
        self._receive_buffer = receive_buffer
        self._socket: RawNetlinkSocket | None = None
        self._held: list[XfrmEvent] | None = []  # None: deliver at once
        self._broken = False  # the socket lost something: open another one
        self._wake = asyncio.Event()  # for run(): a snapshot is due, or `deliver` failed
        self._failure: Exception | None = None
        self._resyncing = asyncio.Lock()

    async def open(self) -> None:
        """Join the groups; from now on nothing is missed. Raises: XfrmError."""
        self.close()
        self._broken = False
        try:
            self._socket = RawNetlinkSocket(NETLINK_XFRM, self._on_datagram, self._on_error)
            await self._socket.join(GROUPS, self._receive_buffer)
        except OSError as error:
            self.close()
            raise XfrmError(error.errno or 0, "cannot receive XFRM notifications") from error

    def close(self) -> None:
        """Leave the groups."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def look(self) -> None:
        """Take in at once what the kernel has notified so far, not in the loop's next turn."""
        if self._socket is not None:
            self._socket.drain()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def run(self) -> None:
        """Resynchronise now and whenever it is needed, until cancelled.

        Raises: XfrmError, DecodeError: a dump failed; whatever `deliver` raised.
        """
        await self.resync()
        while True:
            await self._wake.wait()
            if self._failure is not None:
                raise self._failure
            await self.resync()

    async def resync(self, *, check: bool = False) -> KernelSnapshot:
        """Take a snapshot, deliver it, and go on with the changes since.

        `check`: it should tell nothing new, unless something was lost meanwhile.
        Raises: XfrmError, DecodeError.
        """
        async with self._resyncing:
            losses = self.overruns
            whole = not self._wake.is_set() and self._held is None
            while True:
                self._wake.clear()
                self._held = []
                if self._broken or self._socket is None:
                    await self.open()
                taken = await self.snapshot()
                if self._socket is not None:
                    self._socket.drain()
                folded = replay(taken, self._held or ())
                if folded is not None and not self._broken:
                    break
            self._held = None
            told = replace(folded, check=check and whole and losses == self.overruns)
            self._deliver(told)
            return told

    async def snapshot(self) -> KernelSnapshot:
        """Dump policies and states, on a socket of its own.

        Not atomic, and nothing is delivered. Raises: XfrmError, DecodeError.
        """
        try:
            async with Requests(NETLINK_XFRM) as requests:
                policies = await requests.dump(encode_policy_dump, decode)
                states = await requests.dump(encode_sa_dump, decode)
        except OSError as error:
            raise XfrmError(
                error.errno or errno.ETIMEDOUT, "cannot read the SPD and SAD"
            ) from error
        return KernelSnapshot(
            policies=tuple(event.entry for event in policies if isinstance(event, PolicySet)),
            sas=tuple(event.sa for event in states if isinstance(event, SaSet)),
        )

    def _on_datagram(self, datagram: bytes) -> None:
        try:
            for event in decode(datagram):
                self._take(event)
        except DecodeError as error:
            self._lose(str(error))

    def _take(self, event: XfrmEvent) -> None:
        if self._held is not None:
            self._held.append(event)
            return
        if isinstance(event, PoliciesFlushed | SasFlushed):
            self._wake.set()
        try:
            self._deliver(event)
        except Exception as error:  # run() raises it: asyncio would log and go on
            self._failure = error
            self._wake.set()

    def _on_error(self, error: OSError) -> None:
        self._lose(os.strerror(error.errno) if error.errno else str(error))

    def _lose(self, cause: str) -> None:
        if not self._broken:
            self._broken = True
            self._held = []
            self.overruns += 1
            self._wake.set()
            self._on_overrun(Overrun(cause))
