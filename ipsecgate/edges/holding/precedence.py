"""Running before the threads that we wake up.

Each answer to a held call wakes a thread, which the kernel puts on our own processor. There a nice
value is only a share: against hundreds of such threads we would wait for one of them after almost
every answer, and so would everything else that we do. Real-time priority is no share.

Rule of this module: best effort. Without the right to it (RLIMIT_RTPRIO, CAP_SYS_NICE) nothing
changes but the time.
"""

from __future__ import annotations

import asyncio
import os

PRIORITY = 1  # the lowest real-time priority


class Precedence:
    """Real-time priority for the event loop's thread, while it answers held calls."""

    def __init__(self) -> None:
        self._taken = False  # since the event loop's last turn
        self._in_force = False
        self._is_allowed = True

    def take(self) -> None:
        """Run first, until a turn of the event loop passes without another `take`."""
        self._taken = True
        if self._is_allowed and not self._in_force:
            self._in_force = self._is_allowed = _schedule(os.SCHED_FIFO, PRIORITY)
            if self._in_force:
                asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        if self._taken:
            self._taken = False
            asyncio.get_running_loop().call_soon(self._turn)
        else:
            self._in_force = not _schedule(os.SCHED_OTHER, 0)


def _schedule(policy: int, priority: int) -> bool:
    """Set the policy of this thread; return whether that is allowed. The nice value stays."""
    # A thread or a process that starts meanwhile must not inherit it. Only CAP_SYS_NICE could clear
    # that flag again, so it stays.
    try:
        os.sched_setscheduler(0, policy | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
    except OSError:
        return False
    return True
