"""What repeats while nothing changes is told once, then counted, and no count is lost."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from ipsecgate.controller.journal import Journal, Once
from ipsecgate.controller.repeats import KINDS, WINDOW, Repeats
from ipsecgate.core.model.problem import Problem


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    log = logging.getLogger("test-repeats")
    log.setLevel(logging.INFO)
    yield log
    log.filters.clear()
    log.handlers.clear()


def told(repeats: Repeats[str], kind: str) -> bool:
    if repeats.seen(kind) is not None:
        return False
    repeats.add(kind, kind)
    return True


def test_the_first_is_told_and_the_others_are_counted_once_a_window() -> None:
    clock = Clock()
    repeats: Repeats[str] = Repeats(clock)
    assert [told(repeats, "a") for _ in range(600)] == [True] + 599 * [False]
    assert list(repeats.due()) == []
    clock.now += WINDOW
    assert list(repeats.due()) == [("a", 599, WINDOW)]
    assert not told(repeats, "a"), "it goes on"
    clock.now += WINDOW
    assert list(repeats.due()) == [("a", 1, WINDOW)]
    clock.now += WINDOW
    assert list(repeats.due()) == [], "a quiet minute"
    assert told(repeats, "a"), "so it is news again"


def test_no_count_is_lost_at_the_end_or_among_too_many_kinds() -> None:
    clock = Clock()
    repeats: Repeats[str] = Repeats(clock)
    total = 0
    for number in range(3 * KINDS):
        assert told(repeats, str(number))
        assert not told(repeats, str(number))
    total += sum(count for _, count, _ in repeats.due())
    clock.now += 1
    total += sum(count for _, count, _ in repeats.due(everything=True))
    assert total == 3 * KINDS
    assert list(repeats.due(everything=True)) == []


def test_a_log_message_that_repeats_is_counted_unless_it_reports_a_change(
    log: logging.Logger,
) -> None:
    journal, once = Journal(), Once(log)
    log.addHandler(journal)
    log.addFilter(once)
    for number in range(20):
        log.error("cannot write %s", "/x")
        log.warning("thread %d waits", number, extra={"about": "waits"})
        log.info("covered", extra={"is_change": True})
    texts = [record["text"] for record in journal.since(0)]
    assert texts == ["cannot write /x", "thread 0 waits", *20 * ["covered"]]
    once.tell_repeats(everything=True)
    assert [record["text"] for record in journal.since(22)] == [
        "cannot write /x; again, 19 times in 0 s",
        "thread 0 waits; again, 19 times in 0 s",
    ]
    levels = [record["level"] for record in journal.since(22) if record["kind"] == "log"]
    assert levels == ["error", "warning"]


def test_the_count_of_a_problem_does_not_repeat_its_advice(log: logging.Logger) -> None:
    journal, once = Journal(), Once(log)
    log.addHandler(journal)
    log.addFilter(once)
    for _ in range(3):
        log.error("%s", Problem("a is not gated", "start it"))
    once.tell_repeats(everything=True)
    assert [record["text"] for record in journal.since(0)] == [
        "a is not gated. Next: start it",
        "a is not gated; again, 2 times in 0 s",
    ]
