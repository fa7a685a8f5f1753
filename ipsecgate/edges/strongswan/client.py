"""A session with strongSwan: its configurations, its CHILD_SAs, its events, and commands to it.

Rules of this module:
- Events have a separate connection, registered before `connect` returns. So a CHILD_SA that
  `established` does not list yet will be reported by an event.
- Commands share a second connection and run in order; negotiations use their own (`negotiation`).
- A client never reconnects: it delivers `IkeGone` once, when the daemon is gone, and is finished.
- A child that cannot be read does not affect the others; `unread` names it.
"""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Mapping,
)
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from ipsecgate.core.codec.vici import child_configs, child_sas, is_userspace_esp, widen
from ipsecgate.core.codec.vici_sections import ViciError, sections, split_children, text
from ipsecgate.core.model.events import (
    ChildUp,
    IkeDown,
    IkeEvent,
    IkeGone,
    NegotiationDone,
    NegotiationFailed,
)
from ipsecgate.core.model.flow import Address
from ipsecgate.core.model.ipsec import ChildConfig, ChildName, ChildSa
from ipsecgate.core.model.problem import Cause, Problem
from ipsecgate.edges.strongswan import events as event_packets
from ipsecgate.edges.strongswan.acquisition import Acquisition
from ipsecgate.edges.strongswan.negotiation import Negotiator
from ipsecgate.edges.strongswan.vici import (
    IkeError,
    IkeRefusedError,
    Message,
    ViciConnection,
    message_of,
    no_answer,
)

T = TypeVar("T")

COMMAND_LIMIT = 30.0  # seconds


class IkeClient:
    """A session with the IKE daemon; opened by `connect`, ended by `close` or its `IkeGone`."""

    def __init__(self, path: Path, events: ViciConnection, commands: ViciConnection) -> None:
        self.path = path
        self.reports_loads = False  # whether `on_load` is called for connections that are loaded
        self._on_load: Callable[[], None] = lambda: None
        self._event_connection = events
        self._command_connection = commands
        self._command_lock = asyncio.Lock()
        self._negotiator = Negotiator(path, self.established, self._drop_half_open)
        self._acquisition = Acquisition(self.established, self._list_sas, self._drop_half_open)
        self._tasks: set[asyncio.Task[None]] = set()
        self._events: asyncio.Queue[IkeEvent] = asyncio.Queue()
        self._unread: dict[str, list[str]] = {}  # by command
        self._listed: dict[str, dict[bytes, _Listed]] = {}  # by command, by packet

    @classmethod
    async def connect(cls, path: Path, on_load: Callable[[], None] = lambda: None) -> IkeClient:
        """Connect and register for events. Raises: IkeUnreachableError, IkeRefusedError.

        `on_load` is called when a connection was loaded, or will be in a moment.
        """
        opened: list[ViciConnection] = []
        try:
            async with asyncio.timeout(COMMAND_LIMIT):
                for _ in range(2):
                    opened.append(await ViciConnection.open(path))
                client = cls(path, *opened)
                for name in event_packets.TYPES:
                    await client._event_connection.register(name)
                with suppress(IkeRefusedError):
                    await client._event_connection.register(event_packets.LOG)
                    client.reports_loads = True
                client._on_load = on_load
                await client._negotiator.prepare()
        except BaseException as error:
            for connection in opened:
                connection.close()
            if isinstance(error, TimeoutError):
                raise no_answer(path, COMMAND_LIMIT) from None
            raise
        client._spawn(client._receive_events())
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
        """End the session. Pending calls are cancelled; charon completes what it has begun."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._close()

    def _close(self) -> None:
        self._event_connection.close()
        self._command_connection.close()
        self._negotiator.close()

    @property
    def daemon_pid(self) -> int:
        """The daemon's process id, 0 if our pid namespace does not contain it."""
        return self._event_connection.peer_pid

    async def events(self) -> AsyncIterator[IkeEvent]:
        """Yield events in order; the last one is `IkeGone`."""
        while True:
            event = await self._events.get()
            yield event
            if isinstance(event, IkeGone):
                return

    async def children(self) -> tuple[ChildConfig, ...]:
        """Return the loaded child configurations.

        charon does not report that one was unloaded (`reports_loads`): ask from time to time.
        None is left out: if the selectors of one cannot be read, it has their networks with any
        protocol and port. Raises: IkeError; ViciError if even the networks cannot be read.
        """
        return await self._read("list-conns", "list-conn", "children", child_configs, widen)

    async def established(self) -> tuple[ChildSa, ...]:
        """Return the CHILD_SAs that carry traffic. Raises: IkeError."""
        return await self._read("list-sas", "list-sa", "child-sas", child_sas)

    @property
    def unread(self) -> tuple[str, ...]:
        """Why children of the latest lists could not be read.

        `established` left those out; `children` widen their selectors.
        """
        return tuple(reason for reasons in self._unread.values() for reason in reasons)

    async def _read(
        self,
        command: str,
        stream: str,
        section: str,
        read: Callable[..., Iterable[T]],
        fallback: Callable[[Message], Message] | None = None,
    ) -> tuple[T, ...]:
        """Run a command that lists children, and read each child separately.

        `fallback` changes the message of a child that cannot be read into one that can; without
        it, the child is left out. A packet that was in the last list is not read again.
        """
        last = self._listed.get(command, {})

        def read_packet(packet: bytes) -> tuple[bytes, _Listed]:
            return packet, last.get(packet) or _listed(message_of(packet), section, read, fallback)

        packets = await self._in_turn(
            lambda: self._command_connection.read_list(command, {}, stream, read_packet)
        )
        self._listed[command] = dict(packets)
        for _, listed in packets:
            if listed.error is not None:
                raise listed.error
        self._unread[command] = [reason for _, listed in packets for reason in listed.unread]
        return tuple(item for _, listed in packets for item in listed.items)

    async def does_userspace_esp(self) -> bool:
        """Return whether the daemon does userspace ESP (kernel-libipsec). Raises: IkeError."""
        answer, _ = await self._in_turn(lambda: self._command_connection.exchange("stats", {}))
        return is_userspace_esp(answer)

    async def initiate(self, name: ChildName, limit: float) -> None:
        """Start to negotiate a child; do not wait for the end.

        `NegotiationDone` or `NegotiationFailed` follows within `limit` seconds; a child that is
        already up counts as done.
        """
        self._spawn(self._report(name, self._negotiator.negotiate(name, limit)))

    async def acquire(
        self, name: ChildName, peer: Address, send: Callable[[], None], limit: float
    ) -> None:
        """Do the same for a wildcard: `send` sends the ACQUIRE that names the peer to the daemon.

        `send` may raise OSError.
        """
        self._spawn(self._report(name, self._acquisition.negotiate(name, peer, send, limit)))

    async def terminate(self, ike: str, child: str | None = None, unique: int = 0) -> None:
        """Ask charon to delete an IKE_SA, or only one child of it; do not wait for the end.

        `unique`: only the CHILD_SA with this number.
        Raises: IkeRefusedError if there is none; IkeUnreachableError.
        """
        selection = {"ike": ike} if child is None else {"ike": ike, "child": child}
        if unique:
            selection["child-id"] = str(unique)
        await self._command("terminate", {**selection, "timeout": "-1"})

    def terminate_soon(self, name: ChildName, unique: int = 0) -> None:
        """Ask charon to delete a child, in a task of its own that ignores failures."""
        self._spawn(self._terminate_quietly(name, unique))

    async def _terminate_quietly(self, name: ChildName, unique: int) -> None:
        with suppress(IkeError):
            await self.terminate(name.ike, name.child, unique)

    async def _report(self, name: ChildName, negotiation: Awaitable[Cause | None]) -> None:
        try:
            cause = await negotiation
        except (IkeError, ViciError) as error:
            cause = Cause.of(error)
        except OSError as error:
            cause = Cause(str(error))
        if cause is None:
            self._events.put_nowait(NegotiationDone(name))
        else:
            self._events.put_nowait(NegotiationFailed(name, cause))

    async def _list_sas(self, ike: str) -> list[Message]:
        return await self._command("list-sas", {"ike": ike}, "list-sa")

    async def _drop_half_open(self, ike: str, peer: Address | None = None) -> None:
        """Terminate the half-open IKE_SAs of a configuration that this host initiated.

        `peer`: only those with this one.
        """
        for message in await self._list_sas(ike):
            for _, sa in sections(message):
                if peer is not None and text(sa, "remote-host") != str(peer):
                    continue
                if text(sa, "state") == "CONNECTING" and "initiator" in sa:
                    unique = text(sa, "uniqueid")
                    await self._command(
                        "terminate", {"ike-id": unique, "force": "yes", "timeout": "-1"}
                    )

    async def _command(
        self, command: str, message: Message, stream: str | None = None
    ) -> list[Message]:
        return await self._in_turn(
            lambda: self._command_connection.request(command, message, stream)
        )

    async def _in_turn(self, work: Callable[[], Awaitable[T]]) -> T:
        async with self._command_lock:
            try:
                async with asyncio.timeout(COMMAND_LIMIT):
                    return await work()
            except IkeRefusedError:
                raise
            except BaseException as error:
                self._close()  # a late answer would be taken for the next command's
                if isinstance(error, TimeoutError):
                    raise no_answer(self.path, COMMAND_LIMIT) from None
                raise

    async def _receive_events(self) -> None:
        try:
            while True:
                answer = await self._event_connection.receive()
                if event_packets.is_loaded(answer):
                    self._on_load()
                if line := event_packets.log_line(answer):
                    self._acquisition.on_log(line)
                for event in event_packets.read_events(answer):
                    if isinstance(event, ChildUp):
                        self._negotiator.on_child_up(event.sa.name)
                        self._acquisition.on_child_up(event.sa)
                    elif isinstance(event, IkeDown):
                        self._acquisition.on_ike_down(event)
                    self._events.put_nowait(event)
        except IkeError as error:
            self._close()
            self._events.put_nowait(IkeGone(Problem.of(error)))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.result()  # a defect goes to the loop's exception handler


class _Listed(NamedTuple):
    """What one packet of a list says. `error`: it cannot be used, not even partly."""

    items: tuple[Any, ...]
    unread: tuple[str, ...]
    error: ViciError | None


def _listed(
    message: Message,
    section: str,
    read: Callable[..., Iterable[Any]],
    fallback: Callable[[Message], Message] | None,
) -> _Listed:
    """Read a packet's children one by one."""
    items: list[Any] = []
    unread: list[str] = []
    for child in split_children(message, section):
        try:
            items += read(child, event_packets.NAMES)
        except ViciError as error:
            unread.append(f"{_label(child, section)}: {error}")
            if fallback is None:
                continue
            try:
                items += read(fallback(child), event_packets.NAMES)
            except ViciError as second:
                return _Listed((), (), second)
    return _Listed(tuple(items), tuple(unread), None)


def _label(message: Message, section: str) -> str:
    """Return the names that a message of `split_children` has: "ike/child"."""
    names = [*message]
    for body in message.values():
        if isinstance(body, Mapping) and isinstance(body.get(section), Mapping):
            names += body[section]
    return "/".join(names)
