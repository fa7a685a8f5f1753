"""Find out which IKE daemon runs, without changing it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from vici import Session

from ipsecgate.core.codec.vici import is_userspace_esp


def ike_daemon(path: Path, timeout: float = 5.0) -> tuple[str, bool]:
    """Return the name and version of a daemon, and whether it does userspace ESP.

    `timeout`: seconds for each answer. Raises: OSError.
    """
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(timeout)
        sock.connect(os.fspath(path))
        session = Session(sock)
        version, userspace_esp = session.version(), is_userspace_esp(session.stats())
    return " ".join(version[key].decode() for key in ("daemon", "version")), userspace_esp
