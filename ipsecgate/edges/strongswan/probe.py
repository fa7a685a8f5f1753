"""Ask which IKE daemon answers, without changing it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from vici import Session

from ipsecgate.core.codec.vici import is_userspace_esp


def ike_daemon(path: Path, timeout: float = 5.0) -> tuple[str, bool]:
    """Return what daemon answers on a VICI socket, and whether it does ESP itself.

    Raises: OSError.
    """
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(timeout)
        sock.connect(os.fspath(path))
        session = Session(sock)
        told, userland = session.version(), is_userspace_esp(session.stats())
    return " ".join(told[key].decode() for key in ("daemon", "version")), userland
