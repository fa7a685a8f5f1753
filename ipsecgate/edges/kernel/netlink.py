"""A netlink socket that delivers raw datagrams, and requests over it.

The standard library opens the socket, and one recvfrom() takes a datagram from the kernel's
multicast to the caller. pyroute2, which the lab uses, was of no use here: its queue is keyed by
sequence number, which a notification has from any process's request; its decoder takes five times
as long as our codec; and after one ENOBUFS it stops for good, but an overrun is exactly what we
must notice and survive.

Rules of this module: only datagrams from the kernel (port 0) are delivered; netlink offers no other
authentication. Reading pauses after `SLICE`, so that a flood leaves the event loop time for other
work; the rest is read in its next turn.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import socket
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self, TypeVar

from ipsecgate.core.codec.netlink import DecodeError, DumpEnd, dump_end

SO_RCVBUFFORCE = 33  # asm-generic/socket.h; Python's socket module lacks it
SOL_NETLINK, NETLINK_ADD_MEMBERSHIP = 270, 1  # linux/socket.h, linux/netlink.h
RECEIVE_BUFFER = 64 << 20  # bytes
DATAGRAM_LIMIT = 1 << 18  # bytes
_BUFFER = memoryview(bytearray(DATAGRAM_LIMIT))  # one for all sockets: nothing stays in it
SLICE = 0.002  # seconds
TIME_LIMIT = 60.0  # seconds for a dump
DUMP_ATTEMPTS = 10

OnDatagram = Callable[[bytes], None]
OnError = Callable[[OSError], None]
Encode = Callable[[int], bytes]
"""Returns a request with the given sequence number."""
OpenSocket = Callable[[int, int, int], socket.socket]
"""Opens a socket of a family, kind and protocol: here, or in another network namespace."""
T = TypeVar("T")


class RawNetlinkSocket:
    """A netlink socket of one protocol family, in the network namespace where it is opened.

    `on_error` receives each OSError from reading; ENOBUFS means that datagrams were lost.
    """

    def __init__(
        self,
        family: int,
        on_datagram: OnDatagram,
        on_error: OnError,
        open_socket: OpenSocket = socket.socket,
    ) -> None:
        """Raises: OSError."""
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._socket = open_socket(socket.AF_NETLINK, kind, family)
        self._loop = asyncio.get_running_loop()
        self._on_datagram = on_datagram
        self._on_error = on_error

    def join(self, groups: Iterable[int], receive_buffer: int = RECEIVE_BUFFER) -> None:
        """Bind, join multicast groups, and deliver from now on.

        Without CAP_NET_ADMIN, net.core.rmem_max limits the buffer, which is in bytes.
        Raises: OSError.
        """
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, receive_buffer)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._socket.bind((0, 0))
        for group in groups:
            self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        self._loop.add_reader(self._socket, self.drain)

    def send(self, request: bytes) -> None:
        """Send a request to the kernel. Raises: OSError."""
        self._socket.send(request)

    def close(self) -> None:
        """Stop to deliver."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()

    def drain(self) -> bool:
        """Deliver now what the kernel has queued, for `SLICE` at most; return whether it was all.

        One SA arrives as several datagrams, and only the last one shows that it protects.
        """
        end = time.monotonic() + SLICE
        while self._socket.fileno() >= 0:  # a callback may close it
            try:
                size, (port, _groups) = self._socket.recvfrom_into(_BUFFER)
            except BlockingIOError:
                return True
            except OSError as error:
                self._on_error(error)
                return True
            if port == 0:
                self._on_datagram(bytes(_BUFFER[:size]))
            if time.monotonic() > end:
                return False
        return True


class Requests:
    """A socket for one request at a time; an async context manager.

    It joins no multicast group: a notification carries the sequence number of the request that
    caused it, so on a shared socket it could end a dump early.
    """

    def __init__(self, family: int, open_socket: OpenSocket = socket.socket) -> None:
        self._socket = RawNetlinkSocket(family, self._on_datagram, self._on_error, open_socket)
        self._sequences = itertools.count(1)
        self._sequence = 0
        self._take: OnDatagram = lambda _datagram: None
        self._end: asyncio.Future[DumpEnd] = asyncio.get_running_loop().create_future()

    async def __aenter__(self) -> Self:
        try:
            self._socket.join(())
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
        while not self._end.done() and not self._socket.drain():
            pass
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
