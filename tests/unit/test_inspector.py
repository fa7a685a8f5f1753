"""The controller's side of an inspector; the test is in the place of its process and the kernel."""

from __future__ import annotations

import asyncio
import os
import re
import socket
from collections.abc import AsyncIterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from ipsecgate.core.codec.seccomp import NOTIFICATION
from ipsecgate.core.model.flow import TCP, Flow
from ipsecgate.edges.holding import call_file, inspector, seccomp
from ipsecgate.edges.holding.call_file import SLOT, WAIT, WATCHED, CallFile
from ipsecgate.edges.holding.inspector import Inspector, Inspectors
from ipsecgate.edges.holding.look import Finding
from ipsecgate.edges.holding.messages import FREE, LOOKING, STARTED, Question, encode
from tests.until import until

FINDING = Finding(Flow(IPv4Address("192.0.2.1"), TCP, 80), blocking=True)
THREAD = 1000  # added to a call's id
MANY = 5000
NUMBER = 9  # the listener's


class Processes(Inspectors):
    """Inspectors whose messages the test sends."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[socket.socket] = []
        self.done: list[str] = []
        self.can_start = True

    def start(self, number: int, listener: int, file: int) -> socket.socket | None:
        assert number == NUMBER
        if not self.can_start:
            self.done.append("failed")
            return None
        self.done.append("start")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        theirs.setblocking(False)
        self.ends.append(theirs)
        return ours

    def end(self, number: int) -> None:
        assert number == NUMBER
        self.done.append("end")

    def end_parent(self) -> None:
        self.done.append("end parent")
        for end in self.ends:
            end.close()

    def say(self, message: bytes) -> None:
        self.ends[-1].send(message)


class Bed:
    """An inspector, what it asked about and the calls that continued."""

    def __init__(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.processes = Processes()
        self.file = CallFile.create(path)
        self.questions: list[Question] = []
        self.continued: list[int] = []
        # In the listener's place, a pipe: a byte in it is a call.
        self.listener, self.calls = os.pipe()
        self._caplog = caplog
        monkeypatch.setattr(
            seccomp, "answer", lambda _fd, ident, _error: self.continued.append(ident)
        )
        monkeypatch.setattr(seccomp, "receive", self._receive)
        self.inspector = Inspector(
            self.processes, NUMBER, self.listener, self.file, self.questions.append
        )

    def _receive(self, listener: int, buffer: int) -> bool:
        (ident,) = os.read(listener, 1)
        self.put(ident, call_file.SPARE)
        return True

    def put(self, ident: int, place: int = SLOT) -> None:
        """Have a slot hold a call."""
        NOTIFICATION.pack_into(
            self.file.bytes, place, ident, THREAD + ident, 0, 42, 0xC000003E, 0, *[0] * 6
        )

    def look(self, ident: int) -> None:
        self.file.words[call_file.LOOKING] = ident

    @property
    def blocked(self) -> list[int]:
        """The ids of the calls whose threads were reported to block the inspection."""
        threads = [re.match(r"thread (\d+) blocks", text) for text in self._caplog.messages]
        return [int(found[1]) - THREAD for found in threads if found]

    def close(self) -> None:
        self.inspector.close()
        self.file.close()
        os.close(self.listener)
        os.close(self.calls)


async def ticks(count: float) -> None:
    await asyncio.sleep((count + 0.5) * inspector.TICK)


@pytest.fixture
async def bed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Bed]:
    tmp_path.chmod(0o700)
    monkeypatch.setattr(inspector, "TICK", 0.02)
    monkeypatch.setattr(inspector, "RETRY", 0.1)
    one = Bed(tmp_path / "calls", monkeypatch, caplog)
    yield one
    one.close()


async def test_questions_arrive_in_order(bed: Bed) -> None:
    asked = [Question(SLOT * n, n, THREAD + n, FINDING) for n in range(1, 200)]
    bed.processes.say(STARTED)
    for question in asked:
        bed.processes.say(encode(question))
    await until(lambda: len(bed.questions) == len(asked))
    assert bed.questions == asked


async def test_an_inspector_that_is_blocked_is_replaced_at_once(bed: Bed) -> None:
    bed.processes.say(STARTED)
    bed.put(7)
    bed.look(7)
    await until(lambda: bed.blocked)
    assert bed.blocked == [7]
    assert bed.continued == [7]
    assert bed.processes.done == ["start", "end", "start"]
    assert bed.file.words[WAIT] == 0, "its end may never come"
    assert bed.file.words[call_file.LOOKING] == 0


async def test_an_inspector_that_looks_at_one_call_after_the_other_is_not_blocked(bed: Bed) -> None:
    bed.processes.say(STARTED)
    for ident in range(1, 2 * inspector.TICKS):
        bed.look(ident)
        await ticks(inspector.TICKS - 3)
    assert bed.blocked == []
    assert bed.processes.done == ["start"]


async def test_nothing_runs_while_no_calls_are_made(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    bed.processes.say(STARTED)
    await until(lambda: not bed.file.words[WATCHED])
    await ticks(2)
    loop = asyncio.get_running_loop()
    timers: list[float] = []
    later = loop.call_later

    def call_later(seconds: float, *rest: object) -> asyncio.TimerHandle:
        timers.append(seconds)
        return later(seconds, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "call_later", call_later)
    await asyncio.sleep(10 * inspector.TICK)
    assert [seconds for seconds in timers if seconds == inspector.TICK] == []
    bed.put(7)
    bed.look(7)
    bed.processes.say(LOOKING)
    await until(lambda: bed.blocked)
    assert bed.blocked == [7], "it is watched again"


async def test_a_call_that_may_have_killed_the_inspector_is_not_looked_at_again(bed: Bed) -> None:
    bed.processes.say(STARTED)
    bed.look(7)
    bed.processes.say(encode(Question(SLOT, 6, THREAD, FINDING)))
    bed.processes.ends[-1].close()
    await until(lambda: len(bed.processes.ends) == 2)
    assert bed.continued == [7]
    assert [question.ident for question in bed.questions] == [6], "it had asked before"
    assert bed.file.words[WAIT] > 0, "it takes a moment to end"


async def test_calls_continue_while_no_inspector_can_start(bed: Bed) -> None:
    bed.processes.can_start = False
    bed.put(1)
    bed.put(2, 2 * SLOT)
    bed.file.set_asked(2 * SLOT, asked=True)
    bed.processes.say(STARTED)
    bed.processes.ends[-1].close()
    await until(lambda: 1 in bed.continued)
    os.write(bed.calls, b"\5")
    await until(lambda: 5 in bed.continued)
    assert 2 not in bed.continued, "a call that was asked about waits for its answer"
    bed.processes.can_start = True
    await until(lambda: bed.processes.done[-1] == "start")
    os.write(bed.calls, b"\6")
    await ticks(2)
    assert 6 not in bed.continued, "it is the inspector's"


async def test_no_call_is_received_while_an_old_inspector_may_receive_it(bed: Bed) -> None:
    """Both could wait for the same call, and the controller must never wait."""
    old = CallFile.open_again(bed.file.fd)
    assert old.lock()
    try:
        bed.processes.can_start = False
        bed.processes.say(STARTED)
        bed.processes.ends[-1].close()
        await until(lambda: "failed" in bed.processes.done)
        os.write(bed.calls, b"\5")
        await ticks(2)
        assert 5 not in bed.continued
    finally:
        old.close()
    await until(lambda: 5 in bed.continued)


async def test_an_inspector_that_ends_before_it_started_is_started_again_later(bed: Bed) -> None:
    bed.processes.ends[-1].close()
    await until(lambda: "end" in bed.processes.done)
    await ticks(1)
    assert bed.processes.done == ["start", "end"]
    await until(lambda: bed.processes.done == ["start", "end", "start"])


async def test_a_parent_that_hangs_is_replaced(bed: Bed) -> None:
    await ticks(inspector.TICKS_TO_START - 5)
    assert bed.processes.done == ["start"]
    await until(lambda: bed.processes.done.count("start") == 2)
    assert bed.processes.done == ["start", "end parent", "end", "start"]


async def test_an_inspector_that_does_not_listen_does_not_delay_the_controller(bed: Bed) -> None:
    bed.processes.say(STARTED)
    for ident in range(MANY):
        bed.inspector.tell_free(ident)
    bed.processes.end_epoch()
    assert FREE.unpack(bed.processes.ends[-1].recv(FREE.size)) == (1, 0)
    assert bed.processes.epoch == 2
