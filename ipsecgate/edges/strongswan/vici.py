"""One VICI connection over asyncio: sends and receives the packets of strongSwan's protocol.

Rules of this module:
- PyPI's `vici` encodes packets and messages. We do not use its reader, which skips what it does not
  know, nor its session, which blocks.
- charon answers a command before it reads the next one; events may arrive in between.
- A packet that is longer than VICI allows, or that cannot be parsed, ends the connection, because
  nothing after it can be trusted.

Source: README.md of strongSwan's vici plugin, "Protocol description".
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from vici import protocol

from ipsecgate.core.codec.vici_sections import ViciError
from ipsecgate.core.codec.vici_wire import CMD_RESPONSE, EVENT, EVENT_CONFIRM, Answer, parse
from ipsecgate.errors import GateError

MAX_PACKET: int = protocol.Transport.MAX_SEGMENT  # 512 KiB
PACKETS_PER_TURN = 16  # read before other tasks of the loop get a turn
BUSY_TRIES, BUSY_PAUSE = 200, 0.05  # seconds: 10 s in all
RESTART_IT = "see strongSwan's log, and restart it if it hangs"
TOO_OLD = "install strongSwan 5.9 or later"

T = TypeVar("T")
Message = Mapping[str, Any]

_LENGTH = struct.Struct("!I")
_PEER_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid


def message_of(packet: bytes) -> Message:
    """Return a packet's message. Raises: ViciError."""
    return parse(packet).message


class IkeError(GateError):
    """The IKE daemon cannot be reached, or refused a command."""


class IkeUnreachableError(IkeError):
    """The connection to the IKE daemon cannot be made, or broke."""


class IkeRefusedError(IkeError):
    """The IKE daemon refused a command, or does not know it."""


class ViciConnection:
    """A connection to the daemon at `path`; use `open` to make one."""

    def __init__(self, path: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.path = path
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, path: Path) -> ViciConnection:
        """Connect. Raises: IkeUnreachableError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            await _connect(sock, path)
            reader, writer = await asyncio.open_unix_connection(sock=sock, limit=MAX_PACKET)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            sock.close()
            raise IkeUnreachableError(not_running(path, error), hint=start_it(path)) from error
        except OSError as error:
            sock.close()
            reason = error.strerror or str(error)
            raise _unreachable(path, reason, start_it(path)) from error
        return cls(path, reader, writer)

    @property
    def peer_pid(self) -> int:
        """The pid that listened on the socket: the daemon's, 0 if not in our pid namespace.

        Source: SO_PEERCRED in unix(7).
        """
        sock = self._writer.get_extra_info("socket")
        raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        return int(_PEER_CREDENTIALS.unpack(raw)[0])

    def close(self) -> None:
        """Close without waiting."""
        self._writer.close()

    def send(self, packet: bytes) -> None:
        """Queue a packet, without waiting for it to be sent. Raises: IkeUnreachableError."""
        if self._writer.is_closing():
            raise _unreachable(self.path, "connection closed")
        self._writer.write(_LENGTH.pack(len(packet)) + packet)

    async def receive(self) -> Answer:
        """Wait for a packet. Raises: IkeUnreachableError."""
        return self._read(parse, await self._packet())

    async def _packet(self) -> bytes:
        """Wait for a packet; return its bytes, at least one. Raises: IkeUnreachableError."""
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            if not 0 < length <= MAX_PACKET:
                raise self._unreadable(f"invalid packet length: {length} bytes")
            return await self._reader.readexactly(length)
        except asyncio.IncompleteReadError:
            raise _unreachable(self.path, "the daemon closed the connection") from None
        except OSError as error:
            raise _unreachable(self.path, os.strerror(error.errno or 0)) from error

    def _read(self, read: Callable[[bytes], T], packet: bytes) -> T:
        """Read a packet. Raises: IkeUnreachableError if it cannot be read."""
        try:
            return read(packet)
        except ViciError as error:
            raise self._unreadable(str(error)) from error

    def _unreadable(self, reason: str) -> IkeUnreachableError:
        """End the connection; return the error to raise."""
        self.close()
        return _unreachable(self.path, f"the daemon sent a packet that cannot be read: {reason}")

    async def register(self, event: str) -> None:
        """Subscribe to an event.

        Raises: IkeRefusedError if the daemon does not know it; IkeUnreachableError.
        """
        self.send(protocol.Packet.register_event(event))
        answer = await self._answer([], message_of)
        if answer.kind != EVENT_CONFIRM:
            raise IkeRefusedError(f"strongSwan has no event {event!r}", hint=TOO_OLD)

    async def exchange(
        self, command: str, message: Message, stream: str | None = None
    ) -> tuple[Message, list[Message]]:
        """Run a command; return its answer and the messages of the event `stream` before it.

        Raises: IkeRefusedError if the daemon does not know it; IkeUnreachableError.
        """
        return await self._exchange(command, message, stream, message_of)

    async def request(
        self, command: str, message: Message, stream: str | None = None
    ) -> list[Message]:
        """Run a command; return the messages of the event `stream` that came before its answer.

        Raises: IkeRefusedError with the daemon's reason; IkeUnreachableError.
        """
        return await self.read_list(command, message, stream, message_of)

    async def read_list(
        self, command: str, message: Message, stream: str | None, read: Callable[[bytes], T]
    ) -> list[T]:
        """Do the same; `read` reads each packet, and may raise ViciError.

        A list may be long, so other tasks run while it is read.
        """
        answer, events = await self._exchange(command, message, stream, read)
        if (reason := refusal(answer)) is not None:
            raise IkeRefusedError(f"{command}: {reason}", hint="see strongSwan's log")
        return events

    async def _exchange(
        self, command: str, message: Message, stream: str | None, read: Callable[[bytes], T]
    ) -> tuple[Message, list[T]]:
        if stream is not None:
            await self.register(stream)
        self.send(protocol.Packet.request(command, protocol.Message.serialize(message)))
        events: list[T] = []
        answer = await self._answer(events, read)
        if stream is not None:
            self.send(protocol.Packet.unregister_event(stream))
            await self._answer([], message_of)
        if answer.kind != CMD_RESPONSE:
            raise IkeRefusedError(f"strongSwan has no command {command!r}", hint=TOO_OLD)
        return answer.message, events

    async def _answer(self, events: list[T], read: Callable[[bytes], T]) -> Answer:
        while (packet := await self._packet())[0] == EVENT:
            events.append(self._read(read, packet))
            if len(events) % PACKETS_PER_TURN == 0:
                await asyncio.sleep(0)
        return self._read(parse, packet)


def refusal(answer: Message) -> str | None:
    """Return the reason if an answer reports failure, None if it reports success."""
    if answer.get("success", b"yes") == b"yes":
        return None
    reason = answer.get("errmsg")
    return reason.decode(errors="replace") if isinstance(reason, bytes) else "no reason given"


def _unreachable(path: Path, reason: str, hint: str = RESTART_IT) -> IkeUnreachableError:
    return IkeUnreachableError(f"strongSwan at {path}: {reason}", hint=hint)


async def _connect(sock: socket.socket, path: Path) -> None:
    """Connect; wait while the daemon has too many connections to accept. Raises: OSError.

    asyncio takes the EAGAIN of a full backlog for a connect under way, and reports success.
    Source: unix_stream_connect() in Linux's net/unix/af_unix.c.
    """
    sock.setblocking(False)
    for _ in range(BUSY_TRIES):
        try:
            sock.connect(os.fspath(path))
        except BlockingIOError:
            await asyncio.sleep(BUSY_PAUSE)
        else:
            return
    raise OSError(errno.EAGAIN, "too busy to accept a connection")


def not_running(path: Path, error: OSError) -> str:
    """Return in words that nothing listens on the daemon's socket."""
    return f"strongSwan is not running ({path}: {error.strerror or error})"


def start_it(path: Path) -> str:
    """Return what to do about a daemon that does not listen on its socket."""
    return (
        "start strongSwan: `systemctl start strongswan` (charon-systemd); if it runs, its vici "
        f"plugin does not listen on {path}, which gate.vici names"
    )


def no_answer(path: Path, limit: float) -> IkeUnreachableError:
    """Return the error for a daemon that did not answer for `limit` seconds."""
    return _unreachable(path, f"no answer in {limit:g} s")
