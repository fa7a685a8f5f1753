"""Tell systemd how the service is, and have it keep descriptors: sd_notify(3).

Whoever else listens on NOTIFY_SOCKET and starts the successor with LISTEN_FDS will do.
"""

from __future__ import annotations

import os
import socket

FIRST_FD = 3  # SD_LISTEN_FDS_START


def notify(state: str, *fds: int) -> bool:
    """Send "READY=1", "STATUS=…"; False: there is no service manager, nothing happened."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect(address)
        socket.send_fds(sock, [state.encode()], fds)
    return True


def keep(fd: int, name: str) -> bool:
    """Have a descriptor kept for a successor, under a name. False: nobody keeps it."""
    return notify(f"FDSTORE=1\nFDNAME={name}", fd)


def kept() -> dict[int, str]:
    """Return, once, the descriptors that were kept for us, close-on-exec, and their names.

    Source: sd_listen_fds_with_names(3).
    """
    words = {name: os.environ.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES")}
    if words["PID"] != str(os.getpid()) or not words["FDS"].isdigit():
        return {}
    fds = range(FIRST_FD, FIRST_FD + int(words["FDS"]))
    for fd in fds:
        os.set_inheritable(fd, False)
    return dict(zip(fds, words["FDNAMES"].split(":"), strict=False))
