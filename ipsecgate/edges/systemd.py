"""Tell systemd how the service is: sd_notify(3), sd_watchdog_enabled(3)."""

from __future__ import annotations

import os
import socket
import time
from contextlib import suppress


def notify(**fields: object) -> None:
    """Send READY=1, STATUS=… and the like; without a service manager, nothing happens.

    A manager that cannot be reached is none of our trouble: it has a watchdog.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    message = "\n".join(f"{name}={value}" for name, value in fields.items())
    with (
        suppress(OSError),
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
    ):
        sock.setblocking(False)  # a manager that does not read must not hold up a decision
        sock.connect(address)
        sock.sendall(message.encode())


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
