"""The inspector's controller side, with the test in the place of the inspector process."""

from __future__ import annotations

import asyncio
import socket
from ipaddress import IPv4Address

import pytest

from ipsecgate.core.codec.seccomp import NOTIFICATION, Notification, notification
from ipsecgate.core.model.flow import TCP, Flow
from ipsecgate.edges.holding import inspector
from ipsecgate.edges.holding.inspector import Inspector, InspectorProcess, Question
from ipsecgate.edges.holding.inspector_process import Found, encode
from tests.until import until

FOUND = (Flow(IPv4Address("192.0.2.1"), TCP, 80), True)
MANY = 100


class Process(InspectorProcess):
    """The inspector process: the test answers the questions."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[socket.socket] = []
        self.can = True

    def connect(self) -> socket.socket | None:
        if not self.can:
            return None
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        theirs.setblocking(False)
        self.ends.append(theirs)
        return ours

    def questions(self) -> list[int]:
        """Return the numbers of the calls that the newest process was asked about."""
        asked = []
        while True:
            try:
                asked.append(notification(self.ends[-1].recv(NOTIFICATION.size)).id)
            except BlockingIOError:
                return asked

    def say(self, found: Found | None = None, times: int = 1) -> None:
        for _ in range(times):
            self.ends[-1].send(encode(found))


class Bed:
    """An inspector, its answers, and the calls it reported as blocking."""

    def __init__(self) -> None:
        self.process = Process()
        self.answers: list[tuple[int, Found | None]] = []
        self.blocking: list[int] = []
        self.inspector = Inspector(
            self.process, self._answered, lambda one: self.blocking.append(one.call.id)
        )

    def _answered(self, question: Question, found: Found | None) -> None:
        self.answers.append((question.call.id, found))

    def _blocked(self, question: Question) -> None:
        self.blocking.append(question.call.id)

    def ask(self, *numbers: int) -> None:
        for number in numbers:
            self.inspector.ask(Notification(number, 1, 42, 0, (0,) * 6))


async def settled() -> None:
    """Let the loop read everything in the sockets: it reads one message per turn."""
    for _ in range(2 * MANY):
        await asyncio.sleep(0)


async def ticks(count: int) -> None:
    await asyncio.sleep((count + 0.5) * inspector.TICK)


@pytest.fixture
def bed(monkeypatch: pytest.MonkeyPatch) -> type[Bed]:
    monkeypatch.setattr(inspector, "TICK", 0.02)
    return Bed


async def test_answers_are_delivered_in_order(bed: type[Bed]) -> None:
    one = bed()
    one.ask(1, 2)
    assert one.process.questions() == [], "the process is not ready yet"
    one.process.say()
    await settled()
    assert one.process.questions() == [1, 2]
    one.process.say(FOUND)
    one.process.say(None)
    await settled()
    assert one.answers == [(1, FOUND), (2, None)]
    one.inspector.close()


async def test_no_more_questions_are_sent_than_fit(bed: type[Bed]) -> None:
    one = bed()
    one.process.say()
    await settled()
    one.ask(*range(MANY))
    asked = one.process.questions()
    assert asked == list(range(inspector.IN_FLIGHT))
    one.process.say(FOUND, MANY - 1)
    await settled()
    assert one.process.questions() == list(range(inspector.IN_FLIGHT, MANY))
    assert [number for number, _ in one.answers] == list(range(MANY - 1))
    one.inspector.close()


async def test_a_call_that_blocks_the_inspector_is_released_and_nothing_is_asked_meanwhile(
    bed: type[Bed],
) -> None:
    one = bed()
    one.process.say()
    await settled()
    one.ask(1, 2)
    await until(lambda: one.blocking)
    assert one.blocking == [1]
    assert one.answers == [(1, None), (2, None)]
    one.ask(3)
    assert one.answers[2:] == [(3, None)]
    one.process.questions()
    one.process.say(FOUND)
    await settled()
    one.ask(4)
    assert one.answers[3:] == [(4, None)], "the second answer is still outstanding"
    one.process.say(FOUND)
    await settled()
    one.ask(5)
    assert one.process.questions() == [5]
    one.process.say(FOUND)
    await settled()
    assert one.answers[4:] == [(5, FOUND)]
    assert one.blocking == [1]
    one.inspector.close()


async def test_each_answer_restarts_the_time_limit(bed: type[Bed]) -> None:
    one = bed()
    one.process.say()
    one.ask(*range(4))
    for _ in range(3):
        await ticks(inspector.TICKS - 3)
        one.process.say(FOUND)
        await settled()
    assert one.blocking == []
    assert one.answers == [(number, FOUND) for number in range(3)]
    one.inspector.close()


async def test_the_call_at_which_the_inspector_died_is_not_asked_again(bed: type[Bed]) -> None:
    """That call may have killed it. The others are asked about in the next process."""
    one = bed()
    one.process.say()
    await settled()
    one.ask(1, 2)
    one.process.ends[-1].close()
    await settled()
    assert one.answers == [(1, None)]
    one.process.say()
    await settled()
    assert one.process.questions() == [2]
    one.inspector.close()


async def test_calls_continue_while_no_inspector_can_be_started(bed: type[Bed]) -> None:
    one = bed()
    one.process.can = False
    one.process.ends[-1].close()
    await settled()
    one.ask(1)
    assert one.answers == [(1, None)]
    one.process.can = True
    one.ask(2)
    one.process.say()
    await settled()
    assert one.process.questions() == [2]
    one.inspector.close()


async def test_calls_do_not_wait_for_an_inspector_that_never_becomes_ready(bed: type[Bed]) -> None:
    one = bed()
    one.ask(1)
    await until(lambda: one.answers)
    assert one.answers == [(1, None)]
    assert one.blocking == []
    one.inspector.close()
