"""Report the service's state to systemd, and let it keep descriptors: sd_notify(3).

Any manager works that listens on NOTIFY_SOCKET and starts the successor with LISTEN_FDS.
Source: sd_watchdog_enabled(3), sd_pid_notify_with_fds(3), sd_listen_fds_with_names(3).
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress

from ipsecgate.printable import printable

FIRST_FD = 3  # SD_LISTEN_FDS_START


def has_manager() -> bool:
    """Return whether a service manager wants to be notified."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def notify(*fds: int, **fields: object) -> bool:
    """Send READY=1, STATUS=… and the like, with descriptors; return False if that failed.

    Failures are not logged: a manager that hears nothing acts by its watchdog.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    # `printable` escapes line breaks: one in a value would begin another field.
    message = "\n".join(f"{name}={printable(str(value))}" for name, value in fields.items())
    with (
        suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
    ):
        sock.setblocking(False)  # a manager that does not read must not delay a decision
        sock.connect(address)
        socket.send_fds(sock, [message.encode()], fds)
        return True
    return False


def reloading() -> None:
    """Report that the configuration is being read again; READY=1 reports the end."""
    # Type=notify-reload requires the time, so that the manager ignores an older READY=1.
    notify(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)


def watchdog() -> float | None:
    """Return the seconds within which WATCHDOG=1 is due, None without a watchdog."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None  # inherited from the process for which it was meant
    try:
        limit = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
    except ValueError:
        return None
    return limit if limit > 0 else None


def keep(fd: int, name: str) -> bool:
    """Let the manager keep a descriptor for a successor; return False if that failed."""
    return notify(fd, FDSTORE=1, FDNAME=name)


def kept() -> dict[int, str]:
    """Return the names of the descriptors that the manager kept for us, by descriptor.

    They become close-on-exec. A second call returns nothing.
    """
    words = {name: os.environ.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES")}
    if words["PID"] != str(os.getpid()) or not words["FDS"].isdigit():
        return {}
    fds = range(FIRST_FD, FIRST_FD + int(words["FDS"]))
    for fd in fds:
        os.set_inheritable(fd, False)
    return dict(zip(fds, words["FDNAMES"].split(":"), strict=False))
