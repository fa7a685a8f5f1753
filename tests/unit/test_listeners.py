"""Listeners: which are accepted, and which calls the controller answers. The kernel is faked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from ipsecgate.core.codec.seccomp import NOTIFICATION
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import UDP, Flow
from ipsecgate.edges.holding import call_file, seccomp
from ipsecgate.edges.holding import listener as listener_module
from ipsecgate.edges.holding.call_file import SLOT, SLOTS, SPARE, CallFile
from ipsecgate.edges.holding.listener import Listener
from ipsecgate.edges.holding.listeners import Listeners
from ipsecgate.edges.holding.look import Finding
from ipsecgate.edges.holding.messages import Question

FINDING = Finding(Flow(IPv4Address("192.0.2.1"), UDP, 80), blocking=True)
X86 = 0xC000003E


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    return tmp_path


@pytest.fixture
def file(folder: Path) -> Iterator[CallFile]:
    one = CallFile.create(folder / "1")
    yield one
    one.close()


def put(file: CallFile, place: int, ident: int, pid: int = 1) -> None:
    NOTIFICATION.pack_into(file.bytes, place, ident, pid, 0, 42, X86, 0, *[0] * 6)


@pytest.mark.parametrize("limit", [float("nan"), float("inf"), -1.0, 1e8 + 1])
async def test_a_limit_that_no_timer_accepts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: float
) -> None:
    """JSON allows NaN, and a timer at NaN breaks the order of the loop's other timers."""
    monkeypatch.setattr(seccomp, "is_listener", lambda _fd: True)
    fd, other = os.pipe()
    listeners = Listeners(lambda _event: None, tmp_path)
    with pytest.raises(ValueError, match="cannot be held"):
        listeners.add(fd, limit)
    os.close(other)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.close(fd)


def test_a_call_without_a_pid_is_found_like_any_other(file: CallFile) -> None:
    """The kernel reports pid 0 for a thread outside of the controller's pid namespace."""
    put(file, SLOT, ident=7, pid=0)
    ((place, call),) = file.calls()
    assert (place, call.id) == (SLOT, 7)
    assert SLOT not in file.free()


def test_a_slot_is_free_only_when_its_call_was_answered(file: CallFile) -> None:
    assert len(file.free()) == SLOTS
    assert SPARE not in file.free()
    put(file, SLOT, ident=7)
    put(file, 2 * SLOT, ident=8)
    file.set_asked(2 * SLOT, asked=True)
    file.set_deadline(2 * SLOT, 12.5)
    assert file.deadline(2 * SLOT) == 12.5
    assert len(file.free()) == SLOTS - 2
    file.clear(2 * SLOT)
    assert file.free()[-1] == 2 * SLOT
    assert not file.is_asked(2 * SLOT)
    assert file.deadline(2 * SLOT) == 0


def test_only_one_process_has_the_file_locked(file: CallFile) -> None:
    other = CallFile.open_again(file.fd)
    assert file.is_unused()
    assert other.lock()
    assert not file.is_unused()
    assert not file.lock()
    other.close()
    assert file.is_unused()


class Bed:
    """A listener whose inspector is the test, and what the kernel was told."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waiting = {7, 8}
        self.answers: list[tuple[int, int | None]] = []
        self.told: list[int] = []
        self.events: list[on.CallEvent] = []
        monkeypatch.setattr(seccomp, "is_listener", lambda _fd: True)
        monkeypatch.setattr(seccomp, "wake_on_one_processor", lambda _fd: None)
        monkeypatch.setattr(seccomp, "is_waiting", lambda _fd, ident: ident in self.waiting)
        monkeypatch.setattr(seccomp, "answer", lambda _fd, *what: self.answers.append(what))
        monkeypatch.setattr(listener_module, "Inspector", self._inspector)
        self.listeners = Listeners(self.events.append, folder)
        fd, self.other = os.pipe()
        self.listeners.add(fd, 30.0)
        (path,) = folder.iterdir()
        self.file = CallFile.create(path)

    def _inspector(self, *args: object) -> Bed:
        self.ask = args[-1]
        return self

    def tell_free(self, ident: int) -> None:
        self.told.append(ident)

    def close(self) -> None:
        pass

    def asked(self, ident: int, place: int = SLOT) -> on.CallMade | None:
        self.events.clear()
        self.ask(Question(place, ident, 1, FINDING))  # type: ignore[operator]
        match self.events:
            case [on.CallMade() as made]:
                return made
        return None


@pytest.fixture
async def bed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Bed:
    return Bed(folder, monkeypatch)


async def test_an_inspector_hears_that_a_flow_is_free_if_its_call_did_not_wait(bed: Bed) -> None:
    made = bed.asked(7)
    assert made
    bed.listeners.answer(made.call, None)
    assert bed.answers == [(7, None)]
    assert bed.told == [7]
    made = bed.asked(8)
    assert made
    bed.listeners.answer(made.call, 113)
    assert bed.told == [7]


async def test_a_held_call_does_not_make_its_flow_known_as_free(bed: Bed) -> None:
    made = bed.asked(7)
    assert made
    bed.listeners.hold(made)
    bed.listeners.answer(made.call, None)
    assert bed.told == []


async def test_a_call_that_no_longer_waits_is_not_reported(bed: Bed) -> None:
    assert bed.asked(9) is None
    assert not bed.file.is_asked(SLOT)


@pytest.mark.parametrize("place", [0, 1, SLOT + 8, SPARE + SLOT, 2**32 - 32])
async def test_a_place_that_no_inspector_names_is_ignored(bed: Bed, place: int) -> None:
    assert bed.asked(7, place) is None


async def test_the_deadline_that_a_predecessor_gave_remains(bed: Bed) -> None:
    put(bed.file, SLOT, ident=7)
    bed.file.set_deadline(SLOT, 1.0)  # long ago
    made = bed.asked(7)
    assert made
    assert made.limit == 0.0


def test_a_successor_asks_again_about_the_calls_that_its_predecessor_was_asked_about(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "Inspector", lambda *_: None)
    monkeypatch.setattr(seccomp, "wake_on_one_processor", lambda _fd: None)
    listener = Listener(1, 0, 30.0, folder / "1")
    file = CallFile.create(folder / "1")
    put(file, SLOT, ident=7)
    file.set_asked(SLOT, asked=True)
    listener.follow(None, lambda *_: None)  # type: ignore[arg-type]
    assert not file.is_asked(SLOT)
    assert [call.id for _, call in file.calls()] == [7]
    assert (folder / "1").stat().st_size == call_file.SIZE
