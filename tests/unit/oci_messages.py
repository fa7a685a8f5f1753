"""A container process state as an OCI runtime sends it with the seccomp listener.

Source: OCI runtime specification, "Container Process State".
"""

from __future__ import annotations

from typing import Any

STATE: dict[str, Any] = {
    "ociVersion": "1.0.2",
    "fds": ["seccompFd"],
    "pid": 4422,
    "metadata": "ipsecgate hold=2.5",
    "state": {"id": "db", "status": "creating", "pid": 4422, "bundle": "/b"},
}
