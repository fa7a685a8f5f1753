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
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ipsecgate.core.model.value import value
from ipsecgate.edges.host.control import TIME_LIMIT
from ipsecgate.edges.host.unix_sockets import listening
from ipsecgate.errors import GateError

REQUEST_LIMIT = 4096  # bytes
CLIENTS = 64  # at a time, or a quarter of the descriptors: netlink and IKE need some
_WORK_LIMIT = 60.0  # seconds to carry out a request


@value
class Request:
    """A request's fields, including the verb, and the pid that sent it."""

    words: Mapping[str, Any]
    pid: int


Handler = Callable[[Request], Awaitable[Mapping[str, Any]]]


@asynccontextmanager
async def serving(path: Path, verbs: Mapping[str, Handler]) -> AsyncIterator[None]:
    """Answer requests on a socket until the block ends. Raises: OSError."""
    tasks: set[asyncio.Task[None]] = set()
    limit = min(CLIENTS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)

    def on_client(client: socket.socket) -> None:
        if len(tasks) >= limit:
            client.close()
            return
        task = asyncio.create_task(_serve(client, verbs))
        tasks.add(task)
        task.add_done_callback(on_end)

    def on_end(task: asyncio.Task[None]) -> None:
        tasks.discard(task)
        if not task.cancelled():
            task.result()  # a defect goes to the loop's exception handler, which ends the service

    with listening(path, on_client):
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()


async def _serve(client: socket.socket, verbs: Mapping[str, Handler]) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=client, limit=REQUEST_LIMIT)
    try:
        async with asyncio.timeout(TIME_LIMIT):
            line = await reader.readline()
        answer = await _answer(writer, line, verbs)
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
    writer: asyncio.StreamWriter, line: bytes, verbs: Mapping[str, Handler]
) -> dict[str, Any]:
    credentials = writer.get_extra_info("socket").getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, 12
    )
    pid, uid, _gid = struct.unpack("=iII", credentials)
    if uid not in (0, os.geteuid()):
        return {"error": "only root may ask"}
    try:
        request = json.loads(line)
        handler = verbs[request["verb"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {"error": f'expected {{"verb": NAME}}, where NAME is one of {", ".join(verbs)}'}
    try:
        async with asyncio.timeout(_WORK_LIMIT):
            return {"ok": await handler(Request(request, pid))}
    except GateError as error:
        return {"error": str(error), "hint": error.hint, "code": error.exit_code}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
