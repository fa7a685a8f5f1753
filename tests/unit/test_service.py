"""The service: what systemd receives, and which errors end the process."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest

from ipsecgate.controller.service import Service
from ipsecgate.core.model.pulse import PULSE
from ipsecgate.edges.host import systemd


@pytest.fixture(params=["path", "abstract"])
def manager(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """A service manager's end of the notify socket."""
    address = str(tmp_path / "notify") if request.param == "path" else f"@ipsecgate-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)
        sock.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        yield sock


def received(manager: socket.socket) -> dict[str, str]:
    return dict(line.split("=", 1) for line in manager.recv(4096).decode().splitlines())


def test_the_service_manager_receives_each_field(manager: socket.socket) -> None:
    systemd.notify(READY=1, STATUS="following the kernel, and IKE = charon")
    assert received(manager) == {"READY": "1", "STATUS": "following the kernel, and IKE = charon"}
    before = time.monotonic_ns() // 1000
    systemd.reloading()
    fields = received(manager)
    assert fields["RELOADING"] == "1"
    assert before <= int(fields["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000


def test_without_a_manager_nothing_happens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    systemd.notify(READY=1)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    systemd.notify(READY=1)


@pytest.mark.parametrize(
    ("usec", "pid", "expected"),
    [("30000000", None, 30.0), ("30000000", "us", 30.0), ("30000000", "1", None),
     (None, None, None), ("0", None, None), ("soon", None, None)],
)  # fmt: skip
def test_the_watchdog_counts_only_if_it_is_meant_for_this_process(
    monkeypatch: pytest.MonkeyPatch, usec: str | None, pid: str | None, expected: float | None
) -> None:
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, str(os.getpid()) if value == "us" else value)
    assert systemd.watchdog() == expected


async def test_the_service_reports_at_half_the_watchdog_interval(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Service().pulse == PULSE
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    service, clock = Service(), Mock(return_value=asyncio.get_running_loop().time())
    monkeypatch.setattr(service, "_loop", Mock(time=clock))
    assert service.pulse == 0.05
    assert service.alive()
    assert not service.alive(), "not more often than needed"
    assert received(manager) == {"WATCHDOG": "1"}
    clock.return_value += 0.06
    assert service.alive()


async def test_pulses_come_at_multiples_so_that_they_share_a_wake_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service, clock = Service(), Mock(return_value=1e9 + 3)
    monkeypatch.setattr(service, "_loop", Mock(time=clock))
    assert service.alive()
    assert service.until_pulse() == 2.0
    clock.return_value = 1e9 + 4.9
    assert not service.alive()
    clock.return_value = 1e9 + 5
    assert service.alive()
    assert service.until_pulse() == PULSE


async def test_a_status_is_sent_once(manager: socket.socket) -> None:
    service = Service()
    for status in ("a", "a", "b"):
        service.report(status)
    service.stopping()
    assert [received(manager)["STATUS"] for _ in range(2)] == ["a", "b"]
    assert received(manager)["STOPPING"] == "1"


class DefectError(Exception):
    pass


def defect() -> None:
    raise DefectError


async def test_a_callback_that_raises_ends_the_service() -> None:
    service = Service()
    asyncio.get_running_loop().call_soon(defect)
    with pytest.raises(DefectError):
        await asyncio.wait_for(service.watch(), 5)


async def test_a_reader_that_raises_ends_the_service() -> None:
    service = Service()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        asyncio.get_running_loop().add_reader(ours, defect)
        theirs.send(b"x")
        with pytest.raises(DefectError):
            await asyncio.wait_for(service.watch(), 5)
        asyncio.get_running_loop().remove_reader(ours)


async def test_a_warning_does_not_end_the_service_but_an_exception_does() -> None:
    service = Service()
    loop = asyncio.get_running_loop()
    loop.call_exception_handler({"message": "a warning"})
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(service.watch(), 0.05)
    service = Service()
    full = OSError(errno.EMFILE, "too many")
    loop.call_exception_handler({"message": "elsewhere", "exception": full})
    with pytest.raises(OSError, match="too many"):
        await asyncio.wait_for(service.watch(), 5)
