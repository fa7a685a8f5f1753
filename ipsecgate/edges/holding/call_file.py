"""The file of a listener's calls: the kernel, its inspector and the controller share the memory.

    header   which call the inspector looks at, and the like
    slots    struct seccomp_notif, written by the kernel itself; deadline; whose call it is

A call stays in its slot until it is answered, so a successor who is handed the listener can answer
it, too.

Rules of this module:
- The inspector takes free slots. A call that it asked about belongs to the controller, which frees
  the slot. All other calls are the inspector's.
- All but what the controller wrote itself is untrusted data for the controller.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

from ipsecgate import trust
from ipsecgate.core.codec.seccomp import NOTIFICATION, Notification, notification
from ipsecgate.edges.holding import seccomp

SLOTS = 2048  # calls of one listener that can wait; the hooks judge any further one
WORD = 8
# Words of the header: the id of the call that the inspector looks at, 0 for none; whether the
# controller watches it; and for how many milliseconds it waits for its predecessor's end.
LOOKING, WATCHED, WAIT = range(3)
# After each notification. The deadline is in nanoseconds of CLOCK_MONOTONIC; 0: not held.
DEADLINE = NOTIFICATION.size // WORD
ASKED = DEADLINE + 1
ARCH = 5  # which of the notification's 32-bit words
SLOT = NOTIFICATION.size + 2 * WORD
SPARE = (
    1 + SLOTS
) * SLOT  # for calls that continue at once; the header is in the first slot's place
SIZE = SPARE + SLOT
EMPTY = bytes(NOTIFICATION.size)


class CallFile:
    """The file, mapped. A place is the offset of a slot. Owns the descriptor.

    Each inspector has the file open for itself, and locked for as long as it lives.
    """

    def __init__(self, fd: int) -> None:
        """Map a file of `SIZE` bytes. Raises: OSError."""
        self.fd = fd
        self._map = mmap.mmap(fd, SIZE)
        self.bytes = memoryview(self._map)
        self.words = self.bytes.cast("Q")
        # Of all slots, with the header in the place of the first one.
        self._archs = self.bytes.cast("I")[ARCH :: SLOT // 4]
        self._asked = self.words[ASKED :: SLOT // WORD]
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self._address = ctypes.addressof(self._anchor)

    @classmethod
    def create(cls, path: Path) -> CallFile:
        """Open a file, made if it is missing. Raises: OSError, UntrustedError."""
        trust.folder(path.parent, 0o700)
        fd = trust.open_file(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        try:
            # A sparse file could run out of space when the kernel writes to it.
            os.posix_fallocate(fd, 0, SIZE)
            return cls(fd)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def open_existing(cls, path: Path) -> CallFile:
        """Open a file to read it, without a lock. Raises: OSError, ValueError."""
        return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW))

    @classmethod
    def open_again(cls, fd: int) -> CallFile:
        """Open the file behind a descriptor once more, for a lock of our own. Raises: OSError."""
        return cls(os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC))

    def close(self) -> None:
        """Give memory, descriptor and lock back; the file stays."""
        del self._anchor
        for view in (self._archs, self._asked, self.words):
            view.release()
        self.bytes.release()
        self._map.close()
        os.close(self.fd)

    def lock(self) -> bool:
        """Lock the file, until we end; return False while another process has it locked."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def is_unused(self) -> bool:
        """Tell whether no inspector is left that could receive a call."""
        unused = self.lock()
        if unused:
            fcntl.flock(self.fd, fcntl.LOCK_UN)
        return unused

    def call(self, place: int) -> Notification:
        """Return what a slot holds; `arch` is 0 if it is free.

        The pid cannot tell: it is 0 for a thread that our pid namespace does not contain.
        """
        return notification(bytes(self.bytes[place : place + NOTIFICATION.size]))

    def calls(self) -> Iterator[tuple[int, Notification]]:
        """Yield the place of every call, and the call."""
        for number, arch in enumerate(self._archs.tolist()):
            if arch and number:
                yield number * SLOT, self.call(number * SLOT)

    def free(self) -> list[int]:
        """Return the places that are free, without the spare one; the first one last."""
        slots = zip(self._archs.tolist(), self._asked.tolist(), strict=True)
        free = [number * SLOT for number, taken in enumerate(slots) if taken == (0, 0)]
        return [place for place in reversed(free) if 0 < place < SPARE]

    def receive(self, listener: int, place: int) -> bool:
        """Receive a call into a free slot; wait for one. Return False if its thread went away.

        Raises: OSError.
        """
        self.bytes[place : place + NOTIFICATION.size] = EMPTY  # the kernel insists
        return seccomp.receive(listener, self._address + place)

    def continue_one(self, listener: int) -> None:
        """Receive a call, and let it continue. Waits for one; raises: OSError."""
        if self.receive(listener, SPARE):
            seccomp.answer(listener, self.call(SPARE).id, None)

    def continue_unasked(self, listener: int) -> None:
        """Let all calls continue that were received, but not asked about. Raises: OSError."""
        for place, call in self.calls():
            if not self.is_asked(place):
                seccomp.answer(listener, call.id, None)

    def clear(self, place: int) -> None:
        """Free a slot."""
        self.bytes[place : place + NOTIFICATION.size] = EMPTY
        self.set_deadline(place, 0.0)
        self.words[place // WORD + ASKED] = 0  # last: from now on it can be taken

    def deadline(self, place: int) -> float:
        """Return until when a call is held, in seconds; 0.0: it is not."""
        return self.words[place // WORD + DEADLINE] / 1e9

    def set_deadline(self, place: int, when: float) -> None:
        """Record until when a call is held."""
        self.words[place // WORD + DEADLINE] = int(when * 1e9)

    def is_asked(self, place: int) -> bool:
        """Tell whether the controller answers the call in a slot."""
        return bool(self.words[place // WORD + ASKED])

    def set_asked(self, place: int, asked: bool) -> None:
        """Record whether the controller answers the call in a slot."""
        self.words[place // WORD + ASKED] = asked
