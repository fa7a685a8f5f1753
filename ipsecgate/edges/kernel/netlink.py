"""A netlink socket that delivers raw datagrams, and requests over it.

pyroute2 creates, sizes, binds and closes the socket, and joins its groups. We bypass pyroute2's
queue and decoder, for three reasons, all measured:
- Its queue is keyed by sequence number, and a notification carries the sequence number of the
  request, by any process, that caused it.
- Its decoder takes five times as long as our codec.
- After one ENOBUFS it stops for good, but an overrun is exactly what we must notice and survive.
So we override `setup_endpoint`, as pyroute2's own classes do, and attach our protocol to asyncio's
transport. Then one recvfrom() takes a datagram from the kernel's multicast to the caller.

Only datagrams from the kernel (port 0) are delivered; netlink offers no other authentication.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import socket
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self, TypeVar

from pyroute2.netlink.nlsocket import AsyncNetlinkSocket

from ipsecgate.core.codec.netlink import DecodeError, DumpEnd, dump_end

SO_RCVBUFFORCE = 33  # asm-generic/socket.h; Python's socket module lacks it
RECEIVE_BUFFER = 64 << 20  # bytes
DATAGRAM_LIMIT = 1 << 18  # bytes
DRAIN_LIMIT = 100_000  # datagrams that one `drain` reads at most
TIME_LIMIT = 60.0  # seconds for a dump
DUMP_ATTEMPTS = 10

OnDatagram = Callable[[bytes], None]
OnError = Callable[[OSError], None]
Encode = Callable[[int], bytes]
"""Returns a request with the given sequence number."""
T = TypeVar("T")


class RawNetlinkSocket(AsyncNetlinkSocket):  # type: ignore[misc]  # pyroute2 has no types
    """A netlink socket of one protocol family in the current network namespace.

    `on_error` receives each OSError from reading; ENOBUFS means that datagrams were lost.
    """

    def __init__(self, family: int, on_datagram: OnDatagram, on_error: OnError) -> None:
        super().__init__(family=family)
        self._on_datagram = on_datagram
        self._on_error = on_error

    async def setup_endpoint(self) -> None:
        """Attach our protocol to the socket, once; pyroute2 calls this from bind()."""
        if getattr(self.local, "transport", None) is None:
            (
                self.local.transport,
                self.local.protocol,
            ) = await asyncio.get_running_loop().create_datagram_endpoint(
                lambda: _Protocol(self._on_datagram, self._on_error, self.drain), sock=self.socket
            )

    async def join(self, groups: Iterable[int], receive_buffer: int = RECEIVE_BUFFER) -> None:
        """Bind, and join multicast groups.

        Without CAP_NET_ADMIN, net.core.rmem_max limits the buffer, which is in bytes.
        Raises: OSError.
        """
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, receive_buffer)
        except PermissionError:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await self.bind()
        for group in groups:
            self.add_membership(group)

    def drain(self) -> None:
        """Deliver now all datagrams that the kernel has queued."""
        for _ in range(DRAIN_LIMIT):
            try:
                data, (port, _groups) = self.socket.recvfrom(DATAGRAM_LIMIT, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                self._on_error(error)
                return
            if port == 0:
                self._on_datagram(data)


class _Protocol(asyncio.DatagramProtocol):
    def __init__(
        self, on_datagram: OnDatagram, on_error: OnError, drain: Callable[[], None]
    ) -> None:
        self._on_datagram = on_datagram
        self._on_error = on_error
        self._drain = drain

    def datagram_received(self, data: bytes, addr: tuple[int, int]) -> None:
        if addr[0] == 0:
            self._on_datagram(data)
        # asyncio reads one datagram per turn of its loop. One SA arrives as several, and only the
        # last one shows that it protects, so reading all of them now opens the flow sooner.
        self._drain()

    def error_received(self, exc: Exception) -> None:
        self._on_error(exc if isinstance(exc, OSError) else OSError(str(exc)))


class Requests:
    """A socket for one request at a time; an async context manager.

    It joins no multicast group: a notification carries the sequence number of the request that
    caused it, so on a shared socket it could end a dump early.
    """

    def __init__(self, family: int) -> None:
        self._socket = RawNetlinkSocket(family, self._on_datagram, self._on_error)
        self._sequences = itertools.count(1)
        self._sequence = 0
        self._take: OnDatagram = lambda _datagram: None
        self._end: asyncio.Future[DumpEnd] = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> Self:
        try:
            await self._socket.join(())
        except OSError:
            self._socket.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    async def dump(self, encode: Encode, decode: Callable[[bytes], Iterable[T]]) -> list[T]:
        """Return the decoded objects of a dump.

        Dumps again if the kernel says that the table changed in between (NLM_F_DUMP_INTR).
        Raises: OSError with the kernel's errno; DecodeError; TimeoutError.
        """
        for _ in range(DUMP_ATTEMPTS):
            found: list[T] = []
            self._begin(encode, lambda datagram, into=found: into.extend(decode(datagram)))  # type: ignore[misc]
            async with asyncio.timeout(TIME_LIMIT):
                end = await self._end
            _raise_if(end.error)
            if not end.interrupted:
                return found
        raise OSError(errno.EINTR, f"the table changed during each of {DUMP_ATTEMPTS} dumps")

    def ask(self, encode: Encode, decode: Callable[[bytes], Iterable[T]]) -> list[T]:
        """Return the decoded answer to a request for one object.

        Does not wait: the kernel queues the answer before send() returns.
        Raises: OSError with the kernel's errno, DecodeError.
        """
        found: list[T] = []
        self._begin(encode, lambda datagram: found.extend(decode(datagram)))
        self._socket.drain()
        if not self._end.done():
            raise OSError(errno.EAGAIN, "the kernel did not answer at once")
        _raise_if(self._end.result().error)
        return found

    def _begin(self, encode: Encode, take: OnDatagram) -> None:
        self._sequence = next(self._sequences)
        self._take = take
        self._end = asyncio.get_running_loop().create_future()
        self._socket.send(encode(self._sequence))

    def _on_datagram(self, datagram: bytes) -> None:
        if self._end.done():
            return
        try:
            self._take(datagram)
            end = dump_end(datagram, self._sequence)
        except DecodeError as error:
            self._end.set_exception(error)
            return
        if end is not None:
            self._end.set_result(end)

    def _on_error(self, error: OSError) -> None:
        if not self._end.done():
            self._end.set_exception(error)


def _raise_if(code: int) -> None:
    if code:
        raise OSError(code, os.strerror(code))
