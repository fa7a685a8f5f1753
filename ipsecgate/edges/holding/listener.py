"""One seccomp listener, and the file of the calls that were received from it.

The kernel writes each notification straight into the file, a slot per call, and the call stays
there until it is answered. So a successor who is handed the listener can answer those calls, too.
"""

from __future__ import annotations

import asyncio
import ctypes
import mmap
import os
import select
import struct
from pathlib import Path

from ipsecgate import trust
from ipsecgate.core.codec.seccomp import NOTIFICATION, Notification, notification
from ipsecgate.core.model.events import CallMade
from ipsecgate.edges.holding import seccomp
from ipsecgate.edges.holding.inspector import Inspector

SLOTS = 2048  # calls of one listener that can wait; the hooks judge any further one
DEADLINE = struct.Struct("=d")  # follows each notification; on CLOCK_MONOTONIC, 0: not held
SLOT = NOTIFICATION.size + DEADLINE.size


class Listener:
    """A listener's descriptor, its inspector, and its calls that wait for an answer.

    `limit`: seconds that a call may be held. Owns the descriptor.
    """

    inspector: Inspector  # set when the controller starts to follow the listener

    def __init__(self, number: int, fd: int, limit: float, file: Path) -> None:
        """Map the file. Raises: OSError, UntrustedError."""
        self.number = number
        self.fd = fd
        self.limit = limit
        self.file = file
        self.slots: dict[int, int] = {}  # the offset of each call, by its id
        self.held: dict[int, tuple[CallMade, asyncio.TimerHandle]] = {}  # by id
        self._map = _mapped(file)
        self._base = ctypes.c_char.from_buffer(self._map)
        self._spare, *self._free = range((SLOTS - 1) * SLOT, -SLOT, -SLOT)
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    def recall(self) -> list[tuple[Notification, float]]:
        """Return the calls that a predecessor left unanswered, and their deadlines."""
        found, free = [], []
        self._continue_spare()
        for slot in self._free:
            call, deadline = self._at(slot)
            if _is_call(call) and seccomp.is_waiting(self.fd, call.id):
                self.slots[call.id] = slot
                found.append((call, deadline))
            else:
                self._clear(slot)
                free.append(slot)
        self._free = free
        return found

    def ready(self) -> int:
        """Return what poll(2) reports for the listener, 0 for nothing."""
        events = self._poll.poll(0)
        return events[0][1] if events else 0

    def receive(self) -> Notification | None:
        """Receive a call; None if its thread went away, or if no slot is free.

        A call without a slot continues at once.
        """
        slot = self._free[-1] if self._free else self._spare
        if not seccomp.receive(self.fd, ctypes.addressof(self._base) + slot):
            return None
        if slot == self._spare:
            self._continue_spare()
            return None
        self._free.pop()
        call, _ = self._at(slot)
        self.slots[call.id] = slot
        return call

    def _continue_spare(self) -> None:
        call, _ = self._at(self._spare)
        if _is_call(call):
            seccomp.answer(self.fd, call.id, None)
            self._clear(self._spare)

    def hold(self, made: CallMade, timer: asyncio.TimerHandle) -> None:
        """Record until when a call is held."""
        slot = self.slots[made.call.id]
        DEADLINE.pack_into(self._map, slot + NOTIFICATION.size, timer.when())
        self.held[made.call.id] = made, timer

    def answer(self, ident: int, error: int | None) -> None:
        """Fail a call with an errno, or let it continue (None); then forget it."""
        seccomp.answer(self.fd, ident, error)
        self.forget(ident)

    def forget(self, ident: int) -> None:
        """Free a call's slot and cancel its timer."""
        slot = self.slots.pop(ident, None)
        if slot is not None:
            self._clear(slot)
            self._free.append(slot)
        held = self.held.pop(ident, None)
        if held is not None:
            held[1].cancel()

    def close(self) -> None:
        """Close the descriptor. Unless another process has it, its calls now fail with ENOSYS."""
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


def _is_call(call: Notification) -> bool:
    """Return whether a slot holds a call.

    The pid cannot tell: it is 0 for a thread that our pid namespace does not contain.
    """
    return call.arch != 0


def _mapped(file: Path) -> mmap.mmap:
    trust.folder(file.parent, 0o700)
    fd = trust.open_file(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    try:
        # A sparse file could run out of space when the kernel writes to it.
        os.posix_fallocate(fd, 0, SLOTS * SLOT)
        return mmap.mmap(fd, SLOTS * SLOT)
    finally:
        os.close(fd)
