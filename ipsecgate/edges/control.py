"""The controller's socket: one line of JSON asked, one line of JSON answered.

    {"verb": "status"}  ->  {"ok": {...}}
                        or  {"error": "...", "hint": "what to do", "code": exit code}

Root only: the socket's mode says so, and each peer's credentials are checked.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ipsecgate.errors import GateError, NoControllerError, UsageError

REQUEST_LIMIT = 4096
ANSWER_LIMIT = 16 << 20
CLIENTS = 16  # at a time: descriptors are needed for the kernel and IKE
_TIME_LIMIT = 5.0
_WORK_LIMIT = 60.0  # for a verb that changes something

Handler = Callable[[], Awaitable[Mapping[str, Any]]]


@asynccontextmanager
async def serving(path: Path, verbs: Mapping[str, Handler]) -> AsyncIterator[None]:
    """Answer the verbs on a socket while the block runs. Raises: OSError."""

    clients = 0

    async def on_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal clients
        if clients >= CLIENTS:
            writer.close()
            return
        clients += 1
        try:
            async with asyncio.timeout(_TIME_LIMIT):
                line = await reader.readline()
            answer = await _answer(writer, line, verbs)
            async with asyncio.timeout(_TIME_LIMIT):
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        except (ValueError, OSError, TimeoutError):
            pass  # a peer that does not speak the protocol, or went away
        finally:
            clients -= 1
            writer.close()

    path.unlink(missing_ok=True)  # the lock says that nobody else listens here
    old_mask = os.umask(0o177)
    try:
        server = await asyncio.start_unix_server(on_client, path, limit=REQUEST_LIMIT)
    finally:
        os.umask(old_mask)
    try:
        async with server:
            yield
    finally:
        path.unlink(missing_ok=True)


async def _answer(
    writer: asyncio.StreamWriter, line: bytes, verbs: Mapping[str, Handler]
) -> dict[str, Any]:
    credentials = writer.get_extra_info("socket").getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, 12
    )
    _pid, uid, _gid = struct.unpack("=iII", credentials)
    if uid not in (0, os.geteuid()):
        return {"error": "root only"}
    try:
        request = json.loads(line)
        handler = verbs[request["verb"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {"error": f'expected {{"verb": one of {", ".join(verbs)}}}'}
    try:
        async with asyncio.timeout(_WORK_LIMIT):
            return {"ok": await handler()}
    except GateError as error:
        return {"error": str(error), "hint": error.hint, "code": error.exit_code}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def ask(path: Path, verb: str, limit: float = _TIME_LIMIT) -> dict[str, Any]:
    """Ask the controller, return its answer. Raises: NoControllerError, UsageError, GateError."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(limit)
        try:
            sock.connect(os.fspath(path))
            sock.sendall(json.dumps({"verb": verb}).encode() + b"\n")
            with sock.makefile("rb") as stream:
                line = stream.readline(ANSWER_LIMIT)
        except OSError as error:
            raise NoControllerError(
                f"no controller answers on {path}: {error.strerror or error}",
                hint="start it: `ipsecgate run`, or the service `ipsecgate`",
            ) from error
    try:
        answer: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise NoControllerError(f"the controller on {path} hung up") from error
    if answer.get("code") == UsageError.exit_code:
        raise UsageError(answer["error"], hint=answer["hint"])
    if "ok" not in answer:
        raise GateError(
            f"the controller refused {verb}: {answer.get('error')}", hint=answer.get("hint", "")
        )
    result: dict[str, Any] = answer["ok"]
    return result
