"""Tell systemd how the service is, and have it keep descriptors: sd_notify(3).

Whoever else listens on NOTIFY_SOCKET and starts the successor with LISTEN_FDS will do.
Source: sd_watchdog_enabled(3), sd_pid_notify_with_fds(3), sd_listen_fds_with_names(3).
"""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress

from ipsecgate.printable import printable

FIRST_FD = 3  # SD_LISTEN_FDS_START


def is_there() -> bool:
    """Tell whether there is a manager to be told anything."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def notify(*fds: int, **fields: object) -> bool:
    """Send READY=1, STATUS=… and the like; False: it went nowhere.

    A manager that cannot be reached is none of our trouble: it has a watchdog.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    # A line break in a value would be another field.
    message = "\n".join(f"{name}={printable(str(value))}" for name, value in fields.items())
    with (
        suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
    ):
        sock.setblocking(False)  # a manager that does not read must not hold up a decision
        sock.connect(address)
        socket.send_fds(sock, [message.encode()], fds)
        return True
    return False


def reloading() -> None:
    """Say that the configuration is being read anew; READY=1 ends it."""
    # Type=notify-reload asks for the time: the manager drops an older READY=1.
    notify(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)


def watchdog() -> float | None:
    """Return within how many seconds WATCHDOG=1 is due, None where nobody watches."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None  # meant for another process, from whom it was inherited
    try:
        limit = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6
    except ValueError:
        return None
    return limit if limit > 0 else None


def keep(fd: int, name: str) -> bool:
    """Have a descriptor kept for a successor, under a name. False: nobody does, now."""
    return notify(fd, FDSTORE=1, FDNAME=name)


def kept() -> dict[int, str]:
    """Return, once, the descriptors that were kept for us, close-on-exec, and their names."""
    words = {name: os.environ.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES")}
    if words["PID"] != str(os.getpid()) or not words["FDS"].isdigit():
        return {}
    fds = range(FIRST_FD, FIRST_FD + int(words["FDS"]))
    for fd in fds:
        os.set_inheritable(fd, False)
    return dict(zip(fds, words["FDNAMES"].split(":"), strict=False))
