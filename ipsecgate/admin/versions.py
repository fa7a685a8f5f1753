"""The versions of everything that a decision of the gate depends on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("click", "rich", "vici")
PATIENCE = 0.5  # seconds for each answer of strongSwan

Versions = dict[str, str | None]


def versions(vici: Path) -> Versions:
    """Return the versions by name; None: not installed, or strongSwan does not answer."""
    return {
        "ipsecgate": _of("ipsecgate"),
        "kernel": f"{os.uname().release} {os.uname().machine}",
        "bcc": _of("bcc"),
        "python": platform.python_version(),
        "strongswan": _strongswan(vici),
        **{name: _of(name) for name in LIBRARIES},
    }


def _of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _strongswan(path: Path) -> str | None:
    if not os.access(path, os.R_OK | os.W_OK):
        return None  # and spare the import, which takes 20 ms
    from ipsecgate.edges.strongswan import inventory  # noqa: PLC0415

    try:
        return inventory.version(path, PATIENCE)
    except OSError:
        return None
