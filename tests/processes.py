"""Processes as /proc shows them: their state, their descendants, and waiting for their end."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

GONE = (FileNotFoundError, ProcessLookupError)  # a process may end while its files are read


def process_state(pid: int, thread: int | None = None) -> str | None:
    """Return the state letter of a process or of one of its threads, None if it has ended.

    Source: proc(5), the third field of /proc/PID/stat; the second one may contain anything.
    """
    task = "" if thread is None else f"/task/{thread}"
    with suppress(*GONE):
        return Path(f"/proc/{pid}{task}/stat").read_text().rpartition(")")[2].split()[0]
    return None


def descendants(pid: int) -> dict[int, str]:
    """Return the command lines of a process's children, grandchildren and so on, by pid."""
    found: dict[int, str] = {}
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(*GONE):
            for child in map(int, task.read_text().split()):
                found[child] = ""
                with suppress(*GONE):
                    command = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ")
                    found |= {child: command.decode(errors="replace"), **descendants(child)}
    return found


def alive(pids: Iterable[int]) -> set[int]:
    """Return the running processes; a zombie that only waits to be reaped does not count."""
    return {pid for pid in pids if process_state(pid) not in (None, "Z")}


def outlived(pids: Iterable[int]) -> set[int]:
    """Return the processes that still run after 20 s. Killed ones need time to free memory."""
    deadline = time.monotonic() + 20
    while (left := alive(pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def may_run_first() -> bool:
    """Tell whether real-time priority is allowed here: systemd may have given no share of it."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    except PermissionError:
        return False
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return True
