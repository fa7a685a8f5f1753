"""The controller's socket: a request is one line of JSON, and so is the answer.

    {"verb": "status"}  ->  {"ok": {...}}
                        or  {"error": "...", "hint": "what to do", "code": exit code}

A request may name one of the peer's descriptors by number. Sending the descriptor itself
(SCM_RIGHTS) would need a sendmsg(), which is a call that the peer may just have asked us to hold.

This is the client; `control_server` answers. It does without asyncio, which takes long to import.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ipsecgate.errors import START, GateError, NoControllerError, UsageError

REQUEST_LIMIT = 4096  # bytes
ANSWER_LIMIT = 16 << 20  # bytes
TIME_LIMIT = 5.0  # seconds to send or receive a line

Ask = Callable[..., dict[str, Any]]


def ask(path: Path, verb: str, limit: float = TIME_LIMIT) -> dict[str, Any]:
    """Send a request without fields to the controller; return its answer.

    `limit`: seconds. Raises: NoControllerError, UsageError, GateError.
    """
    with connected(path, limit) as request:
        return request(verb)


@contextmanager
def connected(path: Path, limit: float = TIME_LIMIT) -> Iterator[Ask]:
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
    if isinstance(error, PermissionError):
        return NoControllerError(
            f"this user may not ask the controller on {path}", hint="run it as root"
        )
    if isinstance(error, TimeoutError):
        return NoControllerError(
            f"the controller on {path} did not answer in time",
            hint="see `systemctl status ipsecgate`; a restart opens nothing",
        )
    return NoControllerError(
        f"no controller answers on {path}: {error.strerror or error}",
        hint=START,
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
