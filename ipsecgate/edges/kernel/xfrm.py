"""The kernel's SPD and SAD as a stream of events, over NETLINK_XFRM.

Rules of this module:
- Deliver one ordered sequence: a `KernelSnapshot`, then every change since. If the sequence breaks,
  start again from a new snapshot unasked. It breaks when the socket's buffer overruns, when bytes
  cannot be decoded, and after a flush, which does not say which entries it kept.
- Join the groups, then dump, then deliver the dump and, in the same turn of the loop, the
  notifications that arrived meanwhile. A dump is not atomic: it may have an object as it was before
  or after a change. So it is only right together with them: the last one for an object says how it
  is.
- A dump of many policies takes a second. What is gone must not wait for it: that is delivered at
  once, and once more in its turn, because the dump may still have it.
- Dump on a separate socket: a notification carries the sequence number of the request that caused
  it, so on a shared socket it could end a dump early.
- Never set NETLINK_NO_ENOBUFS: it hides lost notifications. Never join XFRMNLGRP_ACQUIRE: with a
  listener there, the kernel installs larval states even if no IKE daemon runs.
- Which policy applies and which SA protects is for core to decide.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import TracebackType
from typing import Self

from ipsecgate.core.codec.netlink import DecodeError
from ipsecgate.core.codec.xfrm import decode, encode_policy_dump, encode_sa_dump
from ipsecgate.core.model.events import (
    KernelSnapshot,
    PoliciesFlushed,
    PolicySet,
    SaGone,
    SaSet,
    SasFlushed,
    XfrmEvent,
)
from ipsecgate.core.model.ipsec import Sa, SpdEntry
from ipsecgate.core.model.value import value
from ipsecgate.edges.kernel.netlink import RECEIVE_BUFFER, RawNetlinkSocket, Requests
from ipsecgate.errors import GateError

NETLINK_XFRM = 6
GROUP_EXPIRE, GROUP_SA, GROUP_POLICY, GROUP_MIGRATE = 2, 3, 4, 7
GROUPS = (GROUP_EXPIRE, GROUP_SA, GROUP_POLICY, GROUP_MIGRATE)

Flushed = PoliciesFlushed | SasFlushed
Gone = SaGone | Flushed

_HINTS = {
    errno.EPERM: "run it as root: XFRM needs CAP_NET_ADMIN in this network namespace",
    errno.EPROTONOSUPPORT: "modprobe xfrm_user, or boot a kernel with CONFIG_XFRM_USER",
}


class XfrmError(GateError):
    """The kernel's SPD or SAD cannot be read; `errno` says why."""

    def __init__(self, code: int, operation: str) -> None:
        super().__init__(
            f"{operation}: {os.strerror(code)}",
            hint=_HINTS.get(code, "see the kernel's log (dmesg)"),
        )
        self.errno = code


@value
class Overrun:
    """Notifications were lost; everything delivered is stale until the next snapshot."""

    cause: str


class XfrmMonitor:
    """Follows SPD and SAD of the network namespace in which the monitor is opened.

    `deliver` receives the sequence that the module describes, straight from the socket's callback;
    an exception that it raises ends `run`. `on_overrun` is called when the sequence breaks.
    Nothing is delivered before the first `resync`, with which `run` begins, but what is gone.

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
        self._buffered: list[XfrmEvent] | None = []  # until the snapshot; None: deliver at once
        self._broken = False  # the socket lost notifications: open another one
        self._wake = asyncio.Event()  # run() must take a snapshot, or raise `_failure`
        self._failure: Exception | None = None
        self._resyncing = asyncio.Lock()

    async def open(self) -> None:
        """Join the groups. From now on a lost notification is noticed. Raises: XfrmError."""
        self.close()
        self._broken = False
        try:
            self._socket = RawNetlinkSocket(NETLINK_XFRM, self._on_datagram, self._on_error)
            self._socket.join(GROUPS, self._receive_buffer)
        except OSError as error:
            self.close()
            raise XfrmError(error.errno or 0, "cannot receive XFRM notifications") from error

    def close(self) -> None:
        """Leave the groups."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def drain(self) -> None:
        """Deliver now what the kernel has notified, instead of in the loop's next turn."""
        if self._socket is not None and not self._broken:
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
        """Resync now and whenever the sequence breaks, until cancelled.

        Raises: XfrmError, DecodeError if a dump fails; whatever `deliver` raised.
        """
        await self.resync()
        while True:
            await self._wake.wait()
            if self._failure is not None:
                raise self._failure
            await self.resync()

    async def resync(self, *, check: bool = False) -> KernelSnapshot:
        """Take a snapshot and deliver it, then continue with the changes since.

        `check`: mark the snapshot as one that must match what was delivered before, if no
        notification was lost. Raises: XfrmError, DecodeError.
        """
        async with self._resyncing:
            overruns = self.overruns
            unbroken = not self._wake.is_set() and self._buffered is None
            while True:
                self._wake.clear()
                self._buffered = []
                if self._broken or self._socket is None:
                    await self.open()
                taken = await self.snapshot()
                while self._socket is not None and not self._broken and not self._socket.drain():
                    await asyncio.sleep(0)
                flushed = any(isinstance(one, Flushed) for one in self._buffered)
                unbroken = unbroken and not flushed
                if not flushed and not self._broken:
                    break
            unbroken = unbroken and overruns == self.overruns
            snapshot = replace(taken, check=check and unbroken)
            self._deliver(snapshot)
            meanwhile, self._buffered = self._buffered, None
            for event in meanwhile:
                self._handle(event)
            return snapshot

    async def snapshot(self) -> KernelSnapshot:
        """Dump policies and states, on a separate socket; deliver nothing.

        The dump is not atomic. Raises: XfrmError, DecodeError.
        """
        try:
            async with Requests(NETLINK_XFRM) as requests:
                policies = await requests.dump(encode_policy_dump, _policies)
                states = await requests.dump(encode_sa_dump, _sas)
        except OSError as error:
            raise XfrmError(
                error.errno or errno.ETIMEDOUT, "cannot read the SPD and SAD"
            ) from error
        return KernelSnapshot(tuple(policies), tuple(states))

    def _on_datagram(self, datagram: bytes) -> None:
        try:
            for event in decode(datagram):
                self._handle(event)
        except DecodeError as error:
            self._break(str(error))

    def _handle(self, event: XfrmEvent) -> None:
        if self._buffered is not None:
            self._buffered.append(event)
            if isinstance(event, Gone):
                self._pass_on(event)
            return
        if isinstance(event, Flushed):
            self._wake.set()
        self._pass_on(event)

    def _pass_on(self, event: XfrmEvent) -> None:
        try:
            self._deliver(event)
        except Exception as error:  # run() raises it: asyncio would log it and go on
            self._failure = error
            self._wake.set()

    def _on_error(self, error: OSError) -> None:
        self._break(os.strerror(error.errno) if error.errno else str(error))

    def _break(self, cause: str) -> None:
        if not self._broken:
            self._broken = True
            self._buffered = []
            self.overruns += 1
            self._wake.set()
            self._on_overrun(Overrun(cause))


async def dump_sas() -> list[Sa]:
    """Return the kernel's SAs of both directions. Raises: OSError, DecodeError."""
    async with Requests(NETLINK_XFRM) as requests:
        return await requests.dump(encode_sa_dump, _sas)


def _policies(datagram: bytes) -> Iterator[SpdEntry]:
    return (event.entry for event in decode(datagram) if isinstance(event, PolicySet))


def _sas(datagram: bytes) -> Iterator[Sa]:
    return (event.sa for event in decode(datagram) if isinstance(event, SaSet))
