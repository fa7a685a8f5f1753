"""The control socket: requests of clients, and answers of a controller."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from typing import Any

from ipsecgate.edges.host import control, control_server
from ipsecgate.errors import GateError, NoControllerError
from tests.fuzz.engine import Target
from tests.fuzz.files import DEEP, KINDS, NUMBERS, TEXT

WORDS = (
    *DEEP,
    *NUMBERS,
    *TEXT,
    *KINDS,
    b'"verb"',
    b'"status"',
    b"{",
    b"}",
    b":",
    b"\n",
    b"x" * 9000,
)


class AnswerError(Exception):
    """The controller answered with an error, or disconnected."""


class Control(Target):
    """Requests over the socket of a real server, which must keep serving."""

    name = "control"
    refusals = (AnswerError,)
    words = WORDS

    def __init__(self) -> None:
        self._asked = 0
        self._logged: list[object] = []
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        self._path = Path(tempfile.mkdtemp()) / "control.sock"
        self._runner.get_loop().set_exception_handler(lambda _loop, what: self._logged.append(what))
        self._runner.run(self._open())

    async def _open(self) -> None:
        await self._stack.enter_async_context(
            control_server.serving(self._path, {"status": self._status})
        )

    async def _status(self, _request: control_server.Request) -> Mapping[str, Any]:
        self._asked += 1
        return {"pid": 7}

    def real(self, random: Random) -> tuple[bytes, Any]:
        more = random.choice(({}, {"more": [1, None]}, {"Ω": 1e9}))
        end = random.choice((b"\n", b"\n\n", b"\r\n", b"\n{"))
        return json.dumps({"verb": "status", **more}).encode() + end, {"pid": 7}

    def feed(self, data: bytes) -> Any:
        asked = self._asked
        answer = self._runner.run(self._exchange(data))
        if self._logged:
            raise RuntimeError(str(self._logged.pop()))
        if not answer:
            raise AnswerError("disconnected")
        document = json.loads(answer)
        if "ok" not in document:
            assert self._asked == asked
            raise AnswerError(document["error"])
        assert self._asked == asked + 1
        return document["ok"]

    async def _exchange(self, data: bytes) -> bytes:
        reader, writer = await asyncio.open_unix_connection(self._path)
        writer.write(data)
        writer.write_eof()
        try:
            return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.transport.abort()

    def state(self) -> object:
        return [path.name for path in self._path.parent.iterdir()]

    def close(self) -> None:
        self._runner.run(self._stack.aclose())
        self._runner.close()
        self._path.parent.rmdir()


class Answer(Target):
    """Answers, as `ask` parses them."""

    name = "answer"
    refusals = (GateError, NoControllerError)
    words = (*WORDS, b'{"ok": {}}', b'{"error": 1}', b'"ok"')

    def real(self, random: Random) -> tuple[bytes, Any]:
        answer = random.choice(({}, {"pid": 7}, {"children": ["Ω"], "x": {"y": None}}))
        return json.dumps({"ok": answer}).encode() + b"\n", answer

    def feed(self, data: bytes) -> Any:
        result = control.parse_answer(Path("/x"), "status", data)
        assert isinstance(result, dict)
        return result
