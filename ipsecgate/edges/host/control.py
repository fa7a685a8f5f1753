"""The controller's socket: a request is one line of JSON, and so is the answer.

    {"verb": "status"}  ->  {"ok": {...}}
                        or  {"error": "...", "hint": "what to do", "code": exit code}

Root only: the socket's mode says so, and each peer's credentials are checked. A request may name
one of the peer's descriptors by number. Sending the descriptor itself (SCM_RIGHTS) would need a
sendmsg(), which is a call that the peer may just have asked us to hold.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipsecgate.edges.host.unix_sockets import listening
from ipsecgate.errors import GateError, NoControllerError, UsageError

REQUEST_LIMIT = 4096  # bytes
ANSWER_LIMIT = 16 << 20  # bytes
CLIENTS = 64  # at a time, or a quarter of the descriptors: netlink and IKE need some
_TIME_LIMIT = 5.0  # seconds to send or receive a line
_WORK_LIMIT = 60.0  # seconds to carry out a request


@dataclass(frozen=True, slots=True)
class Request:
    """A request's fields, including the verb, and the pid that sent it."""

    words: Mapping[str, Any]
    pid: int


Handler = Callable[[Request], Awaitable[Mapping[str, Any]]]
Ask = Callable[..., dict[str, Any]]


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
        async with asyncio.timeout(_TIME_LIMIT):
            line = await reader.readline()
        answer = await _answer(writer, line, verbs)
        async with asyncio.timeout(_TIME_LIMIT):
            writer.write(json.dumps(answer).encode() + b"\n")
            writer.close()
            await writer.wait_closed()
    except (ValueError, OSError, TimeoutError):
        pass  # the peer does not follow the protocol, or has disconnected
    finally:
        writer.transport.abort()  # close() alone would wait for a peer that does not read


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


def ask(path: Path, verb: str, limit: float = _TIME_LIMIT) -> dict[str, Any]:
    """Send a request without fields to the controller; return its answer.

    `limit`: seconds. Raises: NoControllerError, UsageError, GateError.
    """
    with connected(path, limit) as request:
        return request(verb)


@contextmanager
def connected(path: Path, limit: float = _TIME_LIMIT) -> Iterator[Ask]:
    """Connect to the controller; yield a function that sends one request and returns the answer.

    The function takes the verb, and fields by keyword. It calls neither connect() nor sendto()
    with an address, so it works even if those are held. `limit`: seconds.
    Raises: NoControllerError, now or from the function; UsageError, GateError if it refuses.
    """

    def request(verb: str, **fields: Any) -> dict[str, Any]:
        try:
            sock.sendall(json.dumps({"verb": verb, **fields}).encode() + b"\n")
            with sock.makefile("rb") as stream:
                line = stream.readline(ANSWER_LIMIT)
        except OSError as error:
            raise _no_controller(path, error) from error
        return parse_answer(path, verb, line)

    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(limit)
        try:
            sock.connect(os.fspath(path))
        except OSError as error:
            raise _no_controller(path, error) from error
        yield request


def _no_controller(path: Path, error: OSError) -> NoControllerError:
    return NoControllerError(
        f"no controller answers on {path}: {error.strerror or error}",
        hint="start it with `systemctl start ipsecgate` or `ipsecgate run`",
    )


def parse_answer(path: Path, verb: str, line: bytes) -> dict[str, Any]:
    """Return the result in an answer; `path` and `verb` are for the error messages.

    Raises: NoControllerError, UsageError, GateError.
    """
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise NoControllerError(
            f"the controller on {path} closed the connection before it answered",
            hint="see its log: `journalctl -u ipsecgate`",
        ) from error
    match answer:
        case {"ok": dict(result)}:
            return result
        case {"error": str(reason), "hint": str(hint), "code": UsageError.exit_code}:
            raise UsageError(reason, hint=hint)
        case {"error": str(reason)}:
            raise GateError(
                f"the controller refused {verb}: {reason}", hint=str(answer.get("hint", ""))[:500]
            )
    raise GateError(
        f"the controller on {path} sent an invalid answer",
        hint="if it is of another version, restart it; the hooks keep refusing meanwhile",
    )
