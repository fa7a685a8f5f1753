"""strongSwan: what it has configured, what it has established, what happens to it.

Rules of this module: events have a connection of their own, and are registered before
`connect` returns, so what `established` doesn't show yet will be told. Commands share another
one and run in order; negotiations have their own (`negotiation`). It doesn't
reconnect: a client whose daemon is gone says `IkeGone` once and is done. What it does not
understand of one child says nothing of the others: `unread` names it.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from ipsecgate.core.codec.vici import (
    child_configs,
    child_rekey,
    child_sas,
    child_updown,
    ike_updown,
    is_userspace_esp,
    widen,
)
from ipsecgate.core.codec.vici_sections import ViciError, sections, split_children, text
from ipsecgate.core.codec.vici_selectors import Names
from ipsecgate.core.codec.vici_wire import Answer
from ipsecgate.core.model.events import (
    ChildUp,
    IkeEvent,
    IkeGone,
    IkeUnparsed,
    NegotiationDone,
    NegotiationFailed,
)
from ipsecgate.core.model.ipsec import ChildConfig, ChildName, ChildSa
from ipsecgate.edges.strongswan.negotiation import Negotiator
from ipsecgate.edges.strongswan.vici import (
    IkeError,
    IkeRefusedError,
    Message,
    ViciConnection,
    no_answer,
)

T = TypeVar("T")

EVENTS = ("child-updown", "child-rekey", "ike-updown")
COMMAND_LIMIT = 30.0

NAMES = Names(
    protocol=socket.getprotobyname,
    service=lambda name, protocol: (
        socket.getservbyname(name, protocol) if protocol else socket.getservbyname(name)
    ),
)


class IkeClient:
    """A session with the IKE daemon; made by `connect`, ended by `close` or its `IkeGone`."""

    def __init__(self, path: Path, events: ViciConnection, commands: ViciConnection) -> None:
        self.path = path
        self._event_source = events
        self._commands = commands
        self._command_turn = asyncio.Lock()
        self._negotiator = Negotiator(path, self.established, self._take_back)
        self._tasks: set[asyncio.Task[None]] = set()
        self._events: asyncio.Queue[IkeEvent] = asyncio.Queue()
        self._unread: dict[str, list[str]] = {}  # by command

    @classmethod
    async def connect(cls, path: Path) -> IkeClient:
        """Connect and register for events. Raises: IkeUnreachableError, IkeRefusedError."""
        opened: list[ViciConnection] = []
        try:
            async with asyncio.timeout(COMMAND_LIMIT):
                for _ in range(2):
                    opened.append(await ViciConnection.open(path))
                client = cls(path, *opened)
                for name in EVENTS:
                    await client._event_source.register(name)
                await client._negotiator.prepare()
        except BaseException as error:
            for connection in opened:
                connection.close()
            if isinstance(error, TimeoutError):
                raise no_answer(path, COMMAND_LIMIT) from None
            raise
        client._spawn(client._follow())
        return client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the session and what it was waiting for; charon goes on with what it began."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._close()

    def _close(self) -> None:
        self._event_source.close()
        self._commands.close()
        self._negotiator.close()

    @property
    def daemon_pid(self) -> int:
        """The daemon's process id."""
        return self._event_source.peer_pid

    async def events(self) -> AsyncIterator[IkeEvent]:
        """Yield what happens, in order; the last one is `IkeGone`."""
        while True:
            event = await self._events.get()
            yield event
            if isinstance(event, IkeGone):
                return

    async def children(self) -> tuple[ChildConfig, ...]:
        """Return the children that are configured. There is no event: ask again to know.

        None is left out: of one whose selectors are not understood it is their networks.
        Raises: IkeError, ViciError if not even these are.
        """
        return await self._read("list-conns", "list-conn", "children", child_configs, widen)

    async def established(self) -> tuple[ChildSa, ...]:
        """Return the CHILD_SAs that carry traffic. Raises: IkeError."""
        return await self._read("list-sas", "list-sa", "child-sas", child_sas)

    @property
    def unread(self) -> tuple[str, ...]:
        """What was not understood of the last lists; it was left out of them."""
        return tuple(reason for reasons in self._unread.values() for reason in reasons)

    async def _read(
        self,
        command: str,
        stream: str,
        section: str,
        read: Callable[..., Iterable[T]],
        instead: Callable[[Message], Message] | None = None,
    ) -> tuple[T, ...]:
        """Run a command that lists children, and read each for itself.

        `instead`: what is read of one that is not understood; without it, it is left out.
        """
        messages = await self._command(command, {}, stream)
        found: list[T] = []
        unread: list[str] = []
        for one in (one for message in messages for one in split_children(message, section)):
            try:
                found.extend(read(one, NAMES))
            except ViciError as error:
                unread.append(f"{_label(one, section)}: {error}")
                if instead is not None:
                    found.extend(read(instead(one), NAMES))
        self._unread[command] = unread
        return tuple(found)

    async def userland(self) -> bool:
        """Tell whether the daemon does ESP itself, by kernel-libipsec. Raises: IkeError."""
        answer, _ = await self._in_turn(lambda: self._commands.exchange("stats", {}))
        return is_userspace_esp(answer)

    async def initiate(self, name: ChildName, limit: float) -> None:
        """Have a child negotiated; this does not wait for it.

        `NegotiationDone` or `NegotiationFailed` comes after `limit` seconds at the latest; a
        child that is up already counts as done.
        """
        self._spawn(self._initiate(name, limit))

    async def terminate(self, ike: str, child: str | None = None, unique: int = 0) -> None:
        """Have an IKE_SA, or just one child of it, deleted; return when charon was asked.

        `unique`: only the CHILD_SA of this number.
        Raises: IkeRefusedError if there is none; IkeUnreachableError.
        """
        what = {"ike": ike} if child is None else {"ike": ike, "child": child}
        if unique:
            what["child-id"] = str(unique)
        await self._command("terminate", {**what, "timeout": "-1"})

    def terminate_soon(self, name: ChildName, unique: int = 0) -> None:
        """Have a child deleted; this does not wait for it, nor mind if it went by itself."""
        self._spawn(self._terminate_quietly(name, unique))

    async def _terminate_quietly(self, name: ChildName, unique: int) -> None:
        with suppress(IkeError):
            await self.terminate(*name, unique)

    async def _initiate(self, name: ChildName, limit: float) -> None:
        try:
            cause = await self._negotiator.negotiate(name, limit)
        except (IkeError, ViciError) as error:
            cause = str(error)
        if cause is None:
            self._events.put_nowait(NegotiationDone(name))
        else:
            self._events.put_nowait(NegotiationFailed(name, cause))

    async def _take_back(self, ike: str) -> None:
        """Drop the half-open IKE_SAs of a configuration that we began."""
        for message in await self._command("list-sas", {"ike": ike}, "list-sa"):
            for _, sa in sections(message):
                if text(sa, "state") == "CONNECTING" and "initiator" in sa:
                    unique = text(sa, "uniqueid")
                    await self._command(
                        "terminate", {"ike-id": unique, "force": "yes", "timeout": "-1"}
                    )

    async def _command(
        self, command: str, message: Message, stream: str | None = None
    ) -> list[Message]:
        return await self._in_turn(lambda: self._commands.request(command, message, stream))

    async def _in_turn(self, work: Callable[[], Awaitable[T]]) -> T:
        async with self._command_turn:
            try:
                async with asyncio.timeout(COMMAND_LIMIT):
                    return await work()
            except IkeRefusedError:
                raise
            except BaseException as error:
                self._close()  # an answer that comes later would be taken for the next one's
                if isinstance(error, TimeoutError):
                    raise no_answer(self.path, COMMAND_LIMIT) from None
                raise

    async def _follow(self) -> None:
        reason = ""
        try:
            while True:
                for event in _understood(await self._event_source.receive()):
                    if isinstance(event, ChildUp):
                        self._negotiator.came_up(event.sa.name)
                    self._events.put_nowait(event)
        except IkeError as error:
            reason = str(error)
        self._close()
        self._events.put_nowait(IkeGone(reason))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.result()  # what it did not expect is for the loop's exception handler


def _label(message: Message, section: str) -> str:
    """Return what a message of `split_children` is about."""
    names = [*message]
    for body in message.values():
        if isinstance(body, Mapping) and isinstance(body.get(section), Mapping):
            names += body[section]
    return "/".join(names)


def _understood(answer: Answer) -> list[IkeEvent]:
    """Return what an event packet says, or that it was not understood."""
    try:
        return list(_events(answer))
    except ViciError as error:
        return [IkeUnparsed(str(error))]


def _events(answer: Answer) -> Iterator[IkeEvent]:
    """Yield what an event packet says; others say nothing. Raises: ViciError."""
    match answer.event:
        case "child-updown":
            yield from child_updown(answer.message, NAMES)
        case "child-rekey":
            yield from child_rekey(answer.message, NAMES)
        case "ike-updown":
            yield from ike_updown(answer.message)
