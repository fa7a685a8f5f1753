"""A terminal whose keys are read one by one, and which is left as it was found.

Rules of this module: whatever ends the block, an exception or a signal too, the terminal has its
modes and its content back.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

ENDING = (signal.SIGTERM, signal.SIGHUP)


class Keys:
    """The keys of the terminal on stdin. `wake` ends a wait, from another thread or by a signal."""

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno()
        self._woken, self._waker = os.pipe()
        for fd in (self._woken, self._waker):
            os.set_blocking(fd, False)
        self._former = signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)

    def close(self) -> None:
        """Close what `wake` writes to."""
        signal.set_wakeup_fd(self._former)
        woken, waker = self._woken, self._waker
        self._woken = self._waker = -1  # so that a late `wake` writes to no other file
        os.close(woken)
        os.close(waker)

    def wake(self) -> None:
        """End a wait, now or the next one."""
        with suppress(OSError):  # full, so it is woken anyway; or closed
            os.write(self._waker, b"\0")

    def wait(self, seconds: float) -> str:
        """Return the keys that were pressed; "" if woken, or after so many seconds.

        Raises: EOFError if the terminal is gone.
        """
        ready, _, _ = select.select([self._fd, self._woken], [], [], seconds)
        if self._woken in ready:
            os.read(self._woken, 4096)
        if self._fd not in ready:
            return ""
        try:
            pressed = os.read(self._fd, 64)
        except OSError:
            pressed = b""
        if not pressed:
            raise EOFError
        # An escape sequence, such as an arrow key, means nothing here.
        return "" if pressed.startswith(b"\x1b") else pressed.decode("ascii", "ignore")


@contextmanager
def keys() -> Iterator[Keys]:
    """Read keys one by one, without echo, until the block ends."""
    fd = sys.stdin.fileno()
    modes = termios.tcgetattr(fd)
    handlers = {number: signal.signal(number, _end) for number in ENDING}
    # A stopped process would leave the terminal as it is now. And SIGWINCH needs a handler to wake.
    handlers[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    handlers[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, lambda *_: None)
    found = Keys()
    try:
        tty.setcbreak(fd)
        yield found
    finally:
        with suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(fd, termios.TCSADRAIN, modes)
        found.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)
