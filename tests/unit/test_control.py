"""The controller's socket: what it answers, and what it does with nonsense."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ipsecgate.edges.control import CLIENTS, REQUEST_LIMIT, Request, ask, serving
from ipsecgate.errors import GateError, NoControllerError


async def status(request: Request) -> Mapping[str, Any]:
    return {"pid": 7}


async def broken(request: Request) -> Mapping[str, Any]:
    raise KeyError("a defect")


VERBS = {"status": status, "broken": broken}


async def test_it_answers_its_verbs(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with serving(path, VERBS):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert await asyncio.to_thread(ask, path, "status") == {"pid": 7}
        with pytest.raises(GateError, match="one of status, broken"):
            await asyncio.to_thread(ask, path, "reboot")
        with pytest.raises(GateError, match="KeyError"):
            await asyncio.to_thread(ask, path, "broken")
        assert await asyncio.to_thread(ask, path, "status") == {"pid": 7}, "it goes on"
    assert not path.exists()


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
    ],
)
async def test_nonsense_gets_an_error_or_nothing(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "control.sock"
    async with serving(path, VERBS):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(line)
        if not line.endswith(b"\n"):
            writer.write_eof()
        answer = await reader.read()
        assert answer == b"" or b'"error"' in answer
        writer.close()
        assert await asyncio.to_thread(ask, path, "status") == {"pid": 7}


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(NoControllerError) as caught:
        ask(tmp_path / "none.sock", "status")
    assert caught.value.exit_code == 3
    assert "ipsecgate run" in caught.value.hint


async def test_many_silent_clients_take_no_more_than_their_share(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with serving(path, VERBS):
        silent = [await asyncio.open_unix_connection(path) for _ in range(CLIENTS)]
        reader, writer = await asyncio.open_unix_connection(path)
        assert await reader.read() == b"", "hung up on"
        writer.close()
        for _, each in silent:
            each.close()
        await asyncio.sleep(0.05)
        assert await asyncio.to_thread(ask, path, "status") == {"pid": 7}
