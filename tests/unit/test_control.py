"""The control socket: answers, errors, and clients that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ipsecgate.edges.host import control_server
from ipsecgate.edges.host.control import REQUEST_LIMIT, ask, connected, parse_answer
from ipsecgate.edges.host.control_server import CLIENTS, Request, serving
from ipsecgate.errors import GateError, NoControllerError, UsageError
from tests.until import until


async def status(request: Request) -> Mapping[str, Any]:
    return {"pid": 7}


async def broken(request: Request) -> Mapping[str, Any]:
    raise KeyError("a defect")


VERBS = {"status": status, "broken": broken}


async def test_each_verb_gets_its_answer_and_an_unknown_one_an_error(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with serving(path, VERBS):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert await asyncio.to_thread(ask, path, "status") == {"pid": 7}
        with pytest.raises(GateError, match="one of status, broken"):
            await asyncio.to_thread(ask, path, "reboot")
        with pytest.raises(GateError, match="KeyError"):
            await asyncio.to_thread(ask, path, "broken")
        assert await asyncio.to_thread(ask, path, "status") == {"pid": 7}, "it still serves"
    assert not path.exists()


@pytest.mark.parametrize(
    "words", [{}, {"since": None}, {"since": "soon"}, {"since": []}, {"since": 1e999}]
)
async def test_words_of_another_version_are_a_clear_error(
    tmp_path: Path, words: dict[str, Any]
) -> None:
    async def events(request: Request) -> Mapping[str, Any]:
        return {"since": request.read(lambda words: int(words["since"]))}

    path = tmp_path / "control.sock"

    def request() -> dict[str, Any]:
        with connected(path) as asking:
            return asking("events", **words)

    async with serving(path, {"events": events}):
        with pytest.raises(UsageError, match="cannot read the request 'events'") as caught:
            await asyncio.to_thread(request)
    assert "another version" in caught.value.hint


async def test_an_answer_beyond_the_sockets_buffer_is_no_defect(tmp_path: Path) -> None:
    """asyncio's abort() raises for a connection that close() has ended once its buffer was sent."""
    defects: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, defect: defects.append(defect))

    async def much(request: Request) -> Mapping[str, Any]:
        return {"text": "x" * 4_000_000}

    path = tmp_path / "control.sock"
    async with serving(path, {"status": much}):
        answers = [await asyncio.to_thread(ask, path, "status") for _ in range(3)]
    assert [len(answer["text"]) for answer in answers] == [4_000_000] * 3
    assert not defects


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"{}\n",
        b"[]\n",
        b"\xff\xfe\n",
        b'{"verb": []}\n',
        b"x" * 2 * REQUEST_LIMIT,
        b"[" * 4000 + b"\n",
        b'{"verb":' * 500 + b"\n",
        b"9" * 4000 + b"\n",
        b"NaN\n",
    ],
)
async def test_an_invalid_request_gets_an_error_and_others_are_still_served(
    tmp_path: Path, line: bytes
) -> None:
    path = tmp_path / "control.sock"
    async with serving(path, VERBS):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(line)
        if not line.endswith(b"\n"):
            writer.write_eof()
        answer = await reader.read()
        if len(line) > REQUEST_LIMIT:
            assert answer == b"", "disconnected"
        else:
            assert json.loads(answer)["error"].startswith("expected {")
        writer.close()
        assert await asyncio.to_thread(ask, path, "status") == {"pid": 7}


def test_without_a_controller_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(NoControllerError) as caught:
        ask(tmp_path / "none.sock", "status")
    assert caught.value.exit_code == 3
    assert "ipsecgate run" in caught.value.hint


async def test_silent_clients_beyond_the_limit_are_disconnected(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with serving(path, VERBS):
        silent = [await asyncio.open_unix_connection(path) for _ in range(CLIENTS)]
        reader, writer = await asyncio.open_unix_connection(path)
        assert await reader.read() == b"", "disconnected"
        writer.close()
        for _, each in silent:
            each.close()
        async with asyncio.timeout(10):
            while True:  # until a place is free
                with contextlib.suppress(NoControllerError, GateError):
                    assert await asyncio.to_thread(ask, path, "status") == {"pid": 7}
                    break


async def test_patient_clients_take_none_of_the_others_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that disconnects is noticed at once; beyond the limit they are disconnected."""
    monkeypatch.setattr(control_server, "_WORK_LIMIT", 0.1)
    monkeypatch.setattr(control_server, "WAITING", 2 * CLIENTS)
    waiting, over = set[int](), asyncio.Event()

    async def wait(request: Request) -> Mapping[str, Any]:
        waiting.add(number := request.words["number"])
        try:
            await over.wait()
            return {"number": number}
        finally:
            waiting.discard(number)

    path = tmp_path / "control.sock"
    async with serving(path, VERBS, {"wait": wait}):
        clients = []
        for number in range(2 * CLIENTS):
            clients.append(await asyncio.open_unix_connection(path))
            clients[-1][1].write(json.dumps({"verb": "wait", "number": number}).encode() + b"\n")
            await until(lambda at=number: at in waiting)  # type: ignore[misc]
        await asyncio.sleep(0.2)  # longer than others may work
        assert await asyncio.to_thread(ask, path, "status") == {"pid": 7}
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(b'{"verb": "wait", "number": -1}\n')
        assert await reader.read() == b"", "one too many is disconnected"
        writer.close()
        for _, each in clients[::2]:
            each.close()
        await until(lambda: waiting == set(range(1, 2 * CLIENTS, 2)))
        over.set()
        answers = [json.loads(await reader.readline())["ok"] for reader, _ in clients[1::2]]
        assert [answer["number"] for answer in answers] == list(range(1, 2 * CLIENTS, 2))
        for _, each in clients:
            each.close()


async def test_a_patient_client_that_resets_its_connection_is_no_defect(tmp_path: Path) -> None:
    defects: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, defect: defects.append(defect))
    ended = asyncio.Event()

    async def wait(request: Request) -> Mapping[str, Any]:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return {}

    path = tmp_path / "control.sock"
    async with serving(path, {}, {"wait": wait}):
        client = await peer(path)
        client.sendall(b'{"verb": "wait"}\nand more')
        await asyncio.wait_for(ended.wait(), 10)
        client.close()
        await asyncio.sleep(0.05)
    gc.collect()
    assert not defects


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def peer(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.setblocking(False)
    await asyncio.get_running_loop().sock_connect(made, str(path))
    return made


async def test_a_client_that_does_not_read_its_answer_is_disconnected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncio's close() first waits for the buffer to drain, so the descriptor was never freed."""
    monkeypatch.setattr(control_server, "TIME_LIMIT", 0.5)

    asked = 0

    async def much(request: Request) -> Mapping[str, Any]:
        nonlocal asked
        asked += 1
        return {"text": "x" * 4_000_000}

    path = tmp_path / "control.sock"
    async with serving(path, {"status": much}):
        before = descriptors()
        clients = []
        for _ in range(5):
            clients.append(await peer(path))
            clients[-1].sendall(b'{"verb": "status"}\n')
        # Only the clients' own ends are still open.
        await until(lambda: asked == 5 and descriptors() == before + 5)
        for each in clients:
            each.close()


async def test_an_endless_request_is_disconnected(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with serving(path, VERBS):
        flood = await peer(path)
        with pytest.raises(ConnectionError):
            await asyncio.get_running_loop().sock_sendall(flood, b"x" * 10_000_000)
        flood.close()
        assert await asyncio.to_thread(ask, path, "status") == {"pid": 7}


@pytest.mark.parametrize(
    "answer",
    [b"1", b"[]", b'"ok"', b"null", b'{"ok": 1}', b'{"error": {}}', b"{}", b"[" * 3000, b"\xff"],
)
def test_an_invalid_answer_is_an_error(answer: bytes) -> None:
    with pytest.raises(GateError) as caught:
        parse_answer(Path("control.sock"), "status", answer)
    assert len(str(caught.value)) < 200
