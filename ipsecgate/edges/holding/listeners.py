"""The seccomp listeners: system calls that wait become events, answers are carried out.

    a listener is readable -> the call -> looker: its address and its socket -> CallMade
    Hold -> CallExpired at its limit; CallInterrupted, CallGone as they are noticed
    Answer -> the call goes on, or fails

Rules of this module: no decisions; a call that names no flow of this network namespace
goes on at once, as does one that cannot be looked at: the hooks, or the kernel, say what
is to be said. Every call that was received is in a file as long as it waits, written by
the kernel itself, so that a successor who is handed the listener answers those, too.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import mmap
import os
import re
import select
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from ipsecgate import trust
from ipsecgate.core.codec.seccomp import NOTIFICATION, Notification, notification
from ipsecgate.core.model.events import (
    Call,
    CallEvent,
    CallExpired,
    CallGone,
    CallInterrupted,
    CallMade,
)
from ipsecgate.core.model.flow import Flow
from ipsecgate.core.model.policy import HOLD_IMPATIENT, HOLD_LONGEST
from ipsecgate.edges.holding import seccomp
from ipsecgate.edges.holding.inspector import Inspector, InspectorProcess, Question
from ipsecgate.edges.holding.inspector_process import Found
from ipsecgate.edges.host import systemd

log = logging.getLogger("ipsecgate")

SLOTS = 2048  # calls of one listener that can wait; one more is left to the hooks
DEADLINE = struct.Struct("=d")  # follows each notification; on CLOCK_MONOTONIC, 0: not held
SLOT = NOTIFICATION.size + DEADLINE.size
AT_ONCE = 64  # calls taken in before the loop sees to others
AGAIN = 1.0  # seconds within which an interrupted thread has called again
WATCH = 0.1  # seconds between rounds of looking what became of the held ones' threads
WATCH_EACH = 0.001  # and as long in a round for each of them
RETRY = 1.0  # seconds
NAME = re.compile(r"hold-(\d+)-([\d.]+)")  # of a listener that is kept: its number, its limit


class _Listener:
    """One listener, and the calls received from it that wait for their answers."""

    eye: Inspector  # looks at its calls, as soon as it is followed

    def __init__(self, number: int, fd: int, limit: float, file: Path) -> None:
        self.number = number
        self.fd = fd
        self.limit = limit
        self.file = file
        self.slots: dict[int, int] = {}  # by id, where each call is
        self.held: dict[int, tuple[CallMade, asyncio.TimerHandle]] = {}  # by id
        self._map = _mapped(file)
        self._base = ctypes.c_char.from_buffer(self._map)
        self._spare, *self._free = range((SLOTS - 1) * SLOT, -SLOT, -SLOT)
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    def recall(self) -> list[tuple[Notification, float]]:
        """Return the calls that a predecessor received and did not answer, and their deadlines."""
        found, free = [], []
        self._let_go_spare()
        for slot in self._free:
            call, deadline = self._at(slot)
            if _is_there(call) and seccomp.is_waiting(self.fd, call.id):
                self.slots[call.id] = slot
                found.append((call, deadline))
            else:
                self._clear(slot)
                free.append(slot)
        self._free = free
        return found

    def ready(self) -> int:
        """Return what poll(2) says of it."""
        events = self._poll.poll(0)
        return events[0][1] if events else 0

    def receive(self) -> Notification | None:
        """Receive a call; None if it went away, or there is no place for it to wait."""
        slot = self._free[-1] if self._free else self._spare
        if not seccomp.receive(self.fd, ctypes.addressof(self._base) + slot):
            return None
        if slot == self._spare:
            self._let_go_spare()
            return None
        self._free.pop()
        call, _ = self._at(slot)
        self.slots[call.id] = slot
        return call

    def _let_go_spare(self) -> None:
        call, _ = self._at(self._spare)
        if _is_there(call):
            seccomp.answer(self.fd, call.id, None)
            self._clear(self._spare)

    def hold(self, made: CallMade, timer: asyncio.TimerHandle) -> None:
        """Write down until when a call is held."""
        slot = self.slots[made.call.id]
        DEADLINE.pack_into(self._map, slot + NOTIFICATION.size, timer.when())
        self.held[made.call.id] = made, timer

    def answer(self, ident: int, error: int | None) -> None:
        """Answer a call and forget it."""
        seccomp.answer(self.fd, ident, error)
        self.forget(ident)

    def forget(self, ident: int) -> None:
        """Forget a call, and that it was held."""
        slot = self.slots.pop(ident, None)
        if slot is not None:
            self._clear(slot)
            self._free.append(slot)
        held = self.held.pop(ident, None)
        if held is not None:
            held[1].cancel()

    def close(self) -> None:
        """Close it: where nobody else has it, its callers' calls fail from now on (ENOSYS)."""
        for _, timer in self.held.values():
            timer.cancel()
        os.close(self.fd)
        del self._base
        self._map.close()

    def _at(self, slot: int) -> tuple[Notification, float]:
        raw = self._map[slot : slot + NOTIFICATION.size]
        (deadline,) = DEADLINE.unpack_from(self._map, slot + NOTIFICATION.size)
        return notification(raw), deadline

    def _clear(self, slot: int) -> None:
        self._map[slot : slot + SLOT] = bytes(SLOT)


def _is_there(call: Notification) -> bool:
    """Tell a call from an empty slot. Its pid is 0 where the thread is in no namespace of ours."""
    return call.arch != 0


def _mapped(file: Path) -> mmap.mmap:
    trust.folder(file.parent, 0o700)
    fd = trust.open_file(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    try:
        os.posix_fallocate(fd, 0, SLOTS * SLOT)  # what is sparse can be missing when it is needed
        return mmap.mmap(fd, SLOTS * SLOT)
    finally:
        os.close(fd)


class Listeners:
    """Every listener of an instance; `folder` keeps the calls that wait, for a successor."""

    def __init__(self, tell: Callable[[CallEvent], None], folder: Path) -> None:
        self._tell = tell
        self._folder = folder
        self._looker = InspectorProcess()
        self._of: dict[int, _Listener] = {}
        # Who will call again: its deadline, and until when that is remembered.
        self._again: dict[tuple[int, Flow], tuple[float, float]] = {}
        self._watch: asyncio.TimerHandle | None = None
        self._round: deque[tuple[_Listener, CallMade]] = deque()  # of these still to be looked at

    def take(self, pid: int, fd: int, limit: float) -> None:
        """Take over a process's listener. Raises: OSError, ValueError if it is none."""
        self.add(seccomp.take(pid, fd), limit)

    def add(self, fd: int, limit: float) -> None:
        """Follow a listener that is ours from now on. Raises: OSError, ValueError if it is none."""
        number = time.monotonic_ns()  # no predecessor's, and none of one that was kept too long
        try:
            if not seccomp.is_listener(fd):
                raise ValueError("the descriptor is not a seccomp listener")
            if not 0 <= limit <= HOLD_LONGEST:
                raise ValueError(f"a call cannot be held for {limit:g} s")
            one = _Listener(number, fd, limit, self._folder / str(number))
        except BaseException:
            os.close(fd)
            raise
        self._follow(one)
        self._keep(one)

    def adopt(self, kept: Mapping[int, str]) -> None:
        """Go on with the listeners that the service manager kept, and with who waits there."""
        for fd, name in kept.items():
            found = NAME.fullmatch(name)
            if found is None or not seccomp.is_listener(fd):
                continue
            number, limit = found.groups()
            one = _Listener(int(number), fd, float(limit), self._folder / number)
            waiting = one.recall()
            self._follow(one)
            for call, deadline in waiting:
                one.eye.ask(call, deadline)
        for file in self._folder.glob("*"):
            if int(file.name) not in self._of:
                file.unlink()  # nobody kept that listener

    def hold(self, made: CallMade) -> None:
        """Tell when a call has waited for as long as it may."""
        one = self._of.get(made.call.listener)
        if one is None or made.call.id not in one.slots:
            return
        loop = asyncio.get_running_loop()
        one.hold(made, loop.call_later(made.limit, self._tell, CallExpired(made.call)))
        if self._watch is None:
            self._watch = loop.call_later(WATCH, self._look_after)

    def answer(self, call: Call, error: int | None) -> None:
        """Answer a call, unless nobody waits any more."""
        one = self._of.get(call.listener)
        if one is not None and call.id in one.slots:
            one.answer(call.id, error)

    def close(self) -> None:
        """Close every listener."""
        if self._watch is not None:
            self._watch.cancel()
        for one in self._of.values():
            one.eye.close()
        self._looker.close()
        for one in self._of.values():
            asyncio.get_running_loop().remove_reader(one.fd)
            one.close()
        self._of.clear()

    # --- calls in -------------------------------------------------------------------

    def _follow(self, one: _Listener) -> None:
        self._of[one.number] = one
        one.eye = Inspector(self._looker, partial(self._looked, one), _stuck)
        asyncio.get_running_loop().add_reader(one.fd, self._on_readable, one)

    def _keep(self, one: _Listener) -> None:
        """Have a successor be given it; a manager that is busy is asked again."""
        if one.number not in self._of or not systemd.is_there():
            return
        if not systemd.keep(one.fd, f"hold-{one.number}-{one.limit:.3f}"):
            asyncio.get_running_loop().call_later(RETRY, self._keep, one)

    def _on_readable(self, one: _Listener) -> None:
        for _ in range(AT_ONCE):
            ready = one.ready()
            if ready & select.POLLIN:
                call = one.receive()
                if call is not None:
                    one.eye.ask(call)
                continue
            if ready:
                self._drop(one)  # nobody is left who could call
            return

    def _drop(self, one: _Listener) -> None:
        asyncio.get_running_loop().remove_reader(one.fd)
        del self._of[one.number]
        one.eye.close()
        for ident in one.slots:
            self._tell(CallGone(Call(one.number, ident)))
        one.close()
        one.file.unlink(missing_ok=True)

    def _looked(self, one: _Listener, question: Question, found: Found | None) -> None:
        call = question.call
        if found is None or not seccomp.is_waiting(one.fd, call.id):
            one.answer(call.id, None)
            return
        flow, patient = found
        limit = one.limit if patient else min(one.limit, HOLD_IMPATIENT)
        now = time.monotonic()
        kept, until = self._again.pop((call.pid, flow), (0.0, 0.0))
        if deadline := kept if now <= until else question.deadline:
            limit = max(0.0, deadline - now)
        self._tell(CallMade(Call(one.number, call.id), flow, call.pid, limit))

    # --- what becomes of those that wait ----------------------------------------------

    def _look_after(self) -> None:
        """Look for held calls whose threads were killed, or have a signal; a slice at a time."""
        now = time.monotonic()
        if not self._round:
            self._again = {who: told for who, told in self._again.items() if now <= told[1]}
            self._round.extend(
                (one, made) for one in self._of.values() for made, _ in one.held.values()
            )
        for _ in range(min(AT_ONCE, len(self._round))):
            one, made = self._round.popleft()
            if one.number not in self._of or made.call.id not in one.held:
                continue  # answered meanwhile
            if not seccomp.is_waiting(one.fd, made.call.id):
                one.forget(made.call.id)
                self._tell(CallGone(made.call))
            elif seccomp.is_interrupted(made.pid):
                deadline = one.held[made.call.id][1].when()
                self._again[made.pid, made.flow] = deadline, now + AGAIN
                self._tell(CallInterrupted(made.call))
        pause = AT_ONCE * WATCH_EACH if self._round else WATCH
        loop = asyncio.get_running_loop()
        any_held = any(one.held for one in self._of.values())
        self._watch = loop.call_later(pause, self._look_after) if any_held else None


def _stuck(question: Question) -> None:
    log.warning(
        "thread %d blocks the inspection of its call: until that ends, the other calls of its "
        "listener are not held, only checked by the hooks", question.call.pid,
    )  # fmt: skip
