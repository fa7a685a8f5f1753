"""A fake charon: real VICI packets over a Unix socket, answered by the test."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from vici.protocol import FiniteStream, Message, Packet

from ipsecgate.core.model.events import IkeEvent
from ipsecgate.edges.strongswan.client import IkeClient

Section = dict[str, Any]
Handler = Callable[["Session", Section], Awaitable[Section]]
YES: Section = {"success": "yes"}


def no(reason: str) -> Section:
    return {"success": "no", "errmsg": reason}


class Session:
    """One connection from the client."""

    def __init__(self, charon: FakeCharon, writer: asyncio.StreamWriter) -> None:
        self.charon = charon
        self.writer = writer
        self.events: set[str] = set()

    def send(self, packet: bytes) -> None:
        self.writer.write(struct.pack("!I", len(packet)) + packet)

    def event(self, name: str, message: Section) -> None:
        body = Message.serialize(message)
        self.send(struct.pack("!BB", Packet.EVENT, len(name)) + name.encode() + body)


class FakeCharon:
    """Listens at `path`. `handlers` answer commands; `requests` records them in order."""

    def __init__(self, path: Path, **handlers: Handler) -> None:
        self.path = path
        self.handlers = {name.replace("_", "-"): handler for name, handler in handlers.items()}
        self.known = {"child-updown", "child-rekey", "ike-updown", "control-log", "list-sa"}
        self.known |= {"list-conn"}
        self.requests: list[tuple[str, Section]] = []
        self.sessions: list[Session] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.die()

    def die(self) -> None:
        self._server.close()
        for session in self.sessions:
            session.writer.close()

    def raise_event(self, name: str, message: Section) -> None:
        for session in self.sessions:
            if name in session.events:
                session.event(name, message)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = Session(self, writer)
        self.sessions.append(session)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                (length,) = struct.unpack("!I", await reader.readexactly(4))
                await self._answer(session, FiniteStream(await reader.readexactly(length)))

    async def _answer(self, session: Session, packet: FiniteStream) -> None:
        kind, length = struct.unpack("!BB", packet.read(2))
        name = packet.read(length).decode()
        if kind == Packet.EVENT_REGISTER:
            session.events.add(name)
            known = name in self.known
            session.send(bytes([Packet.EVENT_CONFIRM if known else Packet.EVENT_UNKNOWN]))
        elif kind == Packet.EVENT_UNREGISTER:
            session.events.discard(name)
            session.send(bytes([Packet.EVENT_CONFIRM]))
        else:
            asked = {
                key: value.decode() if isinstance(value, bytes) else value
                for key, value in Message.deserialize(packet).items()
            }
            self.requests.append((name, asked))
            if name not in self.handlers:
                session.send(bytes([Packet.CMD_UNKNOWN]))
                return
            answer = await self.handlers[name](session, asked)
            session.send(bytes([Packet.CMD_RESPONSE]) + Message.serialize(answer))


def streaming(event: str, *messages: Section) -> Handler:
    """Return a handler that sends the events, then an empty answer."""

    async def handler(session: Session, _asked: Section) -> Section:
        for message in messages:
            session.event(event, message)
        return {}

    return handler


def answering(*answers: Section) -> Handler:
    """Return a handler that gives these answers, one per request."""
    left = list(answers)

    async def handler(_session: Session, _asked: Section) -> Section:
        return left.pop(0)

    return handler


async def next_events(client: IkeClient, count: int = 1) -> list[IkeEvent]:
    """Return the next `count` events of a client. Raises: TimeoutError after 30 s."""
    found = []
    async with asyncio.timeout(30):
        async for event in client.events():
            found.append(event)
            if len(found) == count:
                break
    return found
