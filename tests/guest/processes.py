"""Which processes another one started, and which of them do not end."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

GONE = (FileNotFoundError, ProcessLookupError)  # they may end while they are looked at


def descendants(pid: int) -> dict[int, str]:
    """Return the command lines of a process's children, theirs and so on."""
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
    """Return those that run; a zombie that waits for the machine's process 1 does not."""
    running = set()
    for pid in pids:
        with suppress(*GONE):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z":
                running.add(pid)
    return running


def outlived(pids: Iterable[int]) -> set[int]:
    """Return those that do not end: a killed process needs a moment to give its memory back."""
    until = time.monotonic() + 20
    while (left := alive(pids)) and time.monotonic() < until:
        time.sleep(0.05)
    return left
