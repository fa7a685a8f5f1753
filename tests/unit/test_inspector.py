"""The inspector, with the test in the place of its process: each call's finding, or None."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import AsyncIterator
from functools import partial
from ipaddress import IPv4Address

import pytest

from ipsecgate.core.codec.seccomp import NOTIFICATION, Notification, notification
from ipsecgate.core.model.flow import TCP, Flow
from ipsecgate.edges.holding import inspector
from ipsecgate.edges.holding.inspector import Inspector, InspectorProcess
from ipsecgate.edges.holding.inspector_main import Finding, encode
from tests.until import until

FINDING = Finding(Flow(IPv4Address("192.0.2.1"), TCP, 80), blocking=True)
MANY = 100
THREAD = 1000  # added to a call's id


class Process(InspectorProcess):
    """A process whose answers the test sends."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[socket.socket] = []
        self.can_start = True

    def connect(self) -> socket.socket | None:
        if not self.can_start:
            return None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        theirs.setblocking(False)
        self.ends.append(theirs)
        return ours

    def received(self) -> list[int]:
        """Return the ids of the calls that arrived at the newest connection."""
        ids = []
        while True:
            try:
                ids.append(notification(self.ends[-1].recv(NOTIFICATION.size)).id)
            except BlockingIOError:
                return ids

    def answer(self, finding: Finding | None = None, times: int = 1) -> None:
        for _ in range(times):
            self.ends[-1].send(encode(finding))


class Bed:
    """An inspector, its findings and the threads that it warned about."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self.process = Process()
        self.findings: list[tuple[int, Finding | None]] = []
        self.inspector = Inspector(self.process)
        self._caplog = caplog

    def inspect(self, *numbers: int) -> None:
        for number in numbers:
            call = Notification(number, THREAD + number, 42, 0, (0,) * 6)
            self.inspector.inspect(call, partial(self._on_finding, number))

    def _on_finding(self, number: int, finding: Finding | None) -> None:
        self.findings.append((number, finding))

    @property
    def blocked(self) -> list[int]:
        """The ids of the calls whose threads were reported to block the inspection."""
        threads = [re.match(r"thread (\d+) blocks", text) for text in self._caplog.messages]
        return [int(found[1]) - THREAD for found in threads if found]


async def settled() -> None:
    """Let the loop read all that is in the sockets: one message a turn."""
    for _ in range(2 * MANY):
        await asyncio.sleep(0)


async def ticks(count: int) -> None:
    await asyncio.sleep((count + 0.5) * inspector.TICK)


@pytest.fixture
async def bed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Bed]:
    monkeypatch.setattr(inspector, "TICK", 0.02)
    one = Bed(caplog)
    yield one
    one.inspector.close()


async def test_findings_arrive_in_order(bed: Bed) -> None:
    bed.inspect(1, 2)
    assert bed.process.received() == [], "the process is not ready yet"
    bed.process.answer()
    await settled()
    assert bed.process.received() == [1, 2]
    bed.process.answer(FINDING)
    bed.process.answer(None)
    await settled()
    assert bed.findings == [(1, FINDING), (2, None)]


async def test_no_more_calls_are_sent_than_the_socket_holds(bed: Bed) -> None:
    bed.process.answer()
    await settled()
    bed.inspect(*range(MANY))
    assert bed.process.received() == list(range(inspector.IN_FLIGHT))
    bed.process.answer(FINDING, MANY - 1)
    await settled()
    assert bed.process.received() == list(range(inspector.IN_FLIGHT, MANY))
    assert [number for number, _ in bed.findings] == list(range(MANY - 1))


async def test_calls_go_on_while_one_blocks_the_inspection(bed: Bed) -> None:
    bed.process.answer()
    await settled()
    bed.inspect(1, 2)
    await until(lambda: bed.blocked)
    assert bed.blocked == [1]
    assert bed.findings == [(1, None), (2, None)]
    bed.inspect(3)
    assert bed.findings[2:] == [(3, None)]
    bed.process.received()
    bed.process.answer(FINDING)
    await settled()
    bed.inspect(4)
    assert bed.findings[3:] == [(4, None)], "the second answer has not arrived yet"
    bed.process.answer(FINDING)
    await settled()
    bed.inspect(5)
    assert bed.process.received() == [5]
    bed.process.answer(FINDING)
    await settled()
    assert bed.findings[4:] == [(5, FINDING)]
    assert bed.blocked == [1]


async def test_each_answer_restarts_the_time_limit(bed: Bed) -> None:
    bed.process.answer()
    bed.inspect(*range(4))
    for _ in range(3):
        await ticks(inspector.TICKS - 3)
        bed.process.answer(FINDING)
        await settled()
    assert bed.blocked == []
    assert bed.findings == [(number, FINDING) for number in range(3)]


async def test_a_call_that_may_have_killed_the_process_is_not_sent_again(bed: Bed) -> None:
    """The calls behind it are sent to the next process."""
    bed.process.answer()
    await settled()
    bed.inspect(1, 2)
    bed.process.ends[-1].close()
    await settled()
    assert bed.findings == [(1, None)]
    bed.process.answer()
    await settled()
    assert bed.process.received() == [2]


async def test_calls_go_on_if_no_process_can_start(bed: Bed) -> None:
    bed.process.can_start = False
    bed.process.ends[-1].close()
    await settled()
    bed.inspect(1)
    assert bed.findings == [(1, None)]
    bed.process.can_start = True
    bed.inspect(2)
    bed.process.answer()
    await settled()
    assert bed.process.received() == [2]


async def test_calls_go_on_if_the_process_never_becomes_ready(bed: Bed) -> None:
    bed.inspect(1)
    await until(lambda: bed.findings)
    assert bed.findings == [(1, None)]
    assert bed.blocked == []
