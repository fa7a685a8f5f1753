"""An eye, with the test as the process at the other end: what was seen, or that nobody could."""

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
    """Whoever connects is answered by the test."""

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

    def hear(self) -> list[int]:
        """Return the numbers of the calls that the newest end was asked about."""
        heard = []
        while True:
            try:
                heard.append(notification(self.ends[-1].recv(NOTIFICATION.size)).id)
            except BlockingIOError:
                return heard

    def say(self, found: Found | None = None, times: int = 1) -> None:
        for _ in range(times):
            self.ends[-1].send(encode(found))


class Bed:
    """An eye and what it told."""

    def __init__(self) -> None:
        self.process = Process()
        self.told: list[tuple[int, Found | None]] = []
        self.stuck: list[int] = []
        self.eye = Inspector(self.process, self._looked, lambda one: self.stuck.append(one.call.id))

    def _looked(self, question: Question, found: Found | None) -> None:
        self.told.append((question.call.id, found))

    def ask(self, *numbers: int) -> None:
        for number in numbers:
            self.eye.ask(Notification(number, 1, 42, 0, (0,) * 6))


async def settled() -> None:
    """What is in the sockets is read, one message a turn of the loop."""
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
    assert one.process.hear() == [], "nobody is ready"
    one.process.say()
    await settled()
    assert one.process.hear() == [1, 2]
    one.process.say(FOUND)
    one.process.say(None)
    await settled()
    assert one.told == [(1, FOUND), (2, None)]
    one.eye.close()


async def test_no_more_questions_are_sent_than_fit(bed: type[Bed]) -> None:
    one = bed()
    one.process.say()
    await settled()
    one.ask(*range(MANY))
    heard = one.process.hear()
    assert heard == list(range(inspector.IN_FLIGHT))
    one.process.say(FOUND, MANY - 1)
    await settled()
    assert one.process.hear() == list(range(inspector.IN_FLIGHT, MANY))
    assert [number for number, _ in one.told] == list(range(MANY - 1))
    one.eye.close()


async def test_a_call_that_blocks_the_inspector_is_released_and_nothing_is_asked_meanwhile(
    bed: type[Bed],
) -> None:
    one = bed()
    one.process.say()
    await settled()
    one.ask(1, 2)
    await until(lambda: one.stuck)
    assert one.stuck == [1]
    assert one.told == [(1, None), (2, None)]
    one.ask(3)
    assert one.told[2:] == [(3, None)]
    one.process.hear()
    one.process.say(FOUND)
    await settled()
    one.ask(4)
    assert one.told[3:] == [(4, None)], "the second answer is to come"
    one.process.say(FOUND)
    await settled()
    one.ask(5)
    assert one.process.hear() == [5]
    one.process.say(FOUND)
    await settled()
    assert one.told[4:] == [(5, FOUND)]
    assert one.stuck == [1]
    one.eye.close()


async def test_each_answer_restarts_the_time_limit(bed: type[Bed]) -> None:
    one = bed()
    one.process.say()
    one.ask(*range(4))
    for _ in range(3):
        await ticks(inspector.TICKS - 3)
        one.process.say(FOUND)
        await settled()
    assert one.stuck == []
    assert one.told == [(number, FOUND) for number in range(3)]
    one.eye.close()


async def test_the_call_at_which_the_inspector_died_is_not_asked_again(bed: type[Bed]) -> None:
    """Of which it may have died; the others' turn comes with the next process."""
    one = bed()
    one.process.say()
    await settled()
    one.ask(1, 2)
    one.process.ends[-1].close()
    await settled()
    assert one.told == [(1, None)]
    one.process.say()
    await settled()
    assert one.process.hear() == [2]
    one.eye.close()


async def test_calls_continue_while_no_inspector_can_be_started(bed: type[Bed]) -> None:
    one = bed()
    one.process.can = False
    one.process.ends[-1].close()
    await settled()
    one.ask(1)
    assert one.told == [(1, None)]
    one.process.can = True
    one.ask(2)
    one.process.say()
    await settled()
    assert one.process.hear() == [2]
    one.eye.close()


async def test_calls_do_not_wait_for_an_inspector_that_never_becomes_ready(bed: type[Bed]) -> None:
    one = bed()
    one.ask(1)
    await until(lambda: one.told)
    assert one.told == [(1, None)]
    assert one.stuck == []
    one.eye.close()
