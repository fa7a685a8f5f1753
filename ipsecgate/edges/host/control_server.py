"""The controller's end of its socket; `control` has the protocol.

Root only: the socket's mode says so, and each peer's credentials are checked.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from ipsecgate.core.model.value import value
from ipsecgate.edges.host.control import REQUEST_LIMIT, TIME_LIMIT
from ipsecgate.edges.host.unix_sockets import listening
from ipsecgate.errors import GateError, UsageError

T = TypeVar("T")

CLIENTS = 64  # at a time, or a quarter of the descriptors: netlink and IKE need some
WAITING = 4096  # clients of patient verbs at a time, or another quarter
_WORK_LIMIT = 60.0  # seconds to carry out a request


@value
class Request:
    """A request's fields, including the verb, and the pid that sent it."""

    words: Mapping[str, Any]
    pid: int

    def read(self, parse: Callable[[Mapping[str, Any]], T]) -> T:
        """Return what the words mean. Raises: UsageError if `parse` cannot tell."""
        try:
            return parse(self.words)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            verb = self.words["verb"]
            raise UsageError(
                f"the controller cannot read the request {verb!r}: {type(error).__name__}: {error}",
                hint="if it is of another version, restart it: `systemctl restart ipsecgate`",
            ) from error


Handler = Callable[[Request], Awaitable[Mapping[str, Any]]]


@asynccontextmanager
async def serving(
    path: Path, verbs: Mapping[str, Handler], patient: Mapping[str, Handler] | None = None
) -> AsyncIterator[None]:
    """Answer requests on a socket until the block ends. Raises: OSError.

    `patient`: verbs whose clients wait for something. Such a client takes none of the others'
    places. Its handler is cancelled when it disconnects.
    """
    server = _Server(verbs, patient or {})
    with listening(path, server.on_client):
        try:
            yield
        finally:
            server.close()


class _Server:
    """One task for each client."""

    def __init__(self, verbs: Mapping[str, Handler], patient: Mapping[str, Handler]) -> None:
        self._verbs = {**verbs, **patient}
        self._patient = patient.keys()
        self._busy: set[asyncio.Task[None]] = set()
        self._waiting: set[asyncio.Task[None]] = set()
        quarter = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4
        self._limit, self._waiting_limit = min(CLIENTS, quarter), min(WAITING, quarter)

    def on_client(self, client: socket.socket) -> None:
        if len(self._busy) >= self._limit:
            client.close()
            return
        task = asyncio.create_task(self._serve(client))
        self._busy.add(task)
        task.add_done_callback(self._on_end)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        self._busy.discard(task)
        self._waiting.discard(task)
        if not task.cancelled():
            task.result()  # a defect goes to the loop's exception handler, which ends the service

    def close(self) -> None:
        for task in (*self._busy, *self._waiting):
            task.cancel()

    async def _serve(self, client: socket.socket) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=client, limit=REQUEST_LIMIT)
        try:
            async with asyncio.timeout(TIME_LIMIT):
                line = await reader.readline()
            answer = await self._answer(reader, writer, line)
            async with asyncio.timeout(TIME_LIMIT):
                writer.transport.set_write_buffer_limits(0)
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()  # until all of it is sent
        except (ValueError, OSError, TimeoutError):
            pass  # the peer does not follow the protocol, or has disconnected
        finally:
            # close() would wait for a peer that does not read; after it, abort() may raise.
            writer.transport.abort()

    async def _answer(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: bytes
    ) -> dict[str, Any]:
        """Carry out a request. Raises: ConnectionError if a patient client disconnects."""
        credentials = writer.get_extra_info("socket").getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, 12
        )
        pid, uid, _gid = struct.unpack("=iII", credentials)
        if uid not in (0, os.geteuid()):
            return {"error": "only root may ask"}
        try:
            request = json.loads(line)
            verb = request["verb"]
            work = _carry_out(self._verbs[verb], Request(request, pid))
        except (ValueError, KeyError, TypeError, RecursionError):
            names = ", ".join(self._verbs)
            return {"error": f'expected {{"verb": NAME}}, where NAME is one of {names}'}
        if verb not in self._patient:
            try:
                async with asyncio.timeout(_WORK_LIMIT):
                    return await work
            except TimeoutError:
                text = f"no result after {_WORK_LIMIT:g} s; it may still take effect"
                return {"error": text}
        if len(self._waiting) >= self._waiting_limit:
            work.close()
            raise ConnectionAbortedError("too many clients wait")
        if (task := asyncio.current_task()) is not None:
            self._busy.discard(task)
            self._waiting.add(task)
        return await _while_connected(reader, work)


async def _while_connected(
    reader: asyncio.StreamReader, work: Coroutine[Any, Any, dict[str, Any]]
) -> dict[str, Any]:
    """Return the result of some work. Raises: ConnectionError if the peer disconnects first."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(reader))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ConnectionAbortedError("the client has disconnected")
    finally:
        working.cancel()
        watching.cancel()


async def _disconnected(reader: asyncio.StreamReader) -> None:
    with suppress(OSError):
        await reader.read(1)


async def _carry_out(handler: Handler, request: Request) -> dict[str, Any]:
    try:
        return {"ok": await handler(request)}
    except GateError as error:
        return {"error": str(error), "hint": error.hint, "code": error.exit_code}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
