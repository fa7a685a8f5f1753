"""What /proc says of a process."""

from __future__ import annotations

from pathlib import Path


def name_of(pid: int) -> str | None:
    """Return the name of a process or thread, None if it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
    except OSError:
        return None


def waits_for_supervisor(pid: int) -> bool:
    """Tell whether a thread waits in a call that seccomp reports; True if the kernel cannot say.

    Source: proc(5), /proc/PID/stack, for root, with CONFIG_STACKTRACE; kernel/seccomp.c.
    """
    try:
        return "seccomp_do_user_notification" in Path(f"/proc/{pid}/stack").read_text()
    except FileNotFoundError:
        return Path(f"/proc/{pid}").exists()
    except OSError:
        return False  # it has just ended


def sockets_of(pid: int) -> set[int]:
    """Return the inodes of the sockets that a process has open; none if it has ended."""
    try:
        links = [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return set()
    return {int(link[8:-1]) for link in links if link.startswith("socket:[")}
