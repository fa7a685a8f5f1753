"""A test kernel that really panics before any command begins."""

from __future__ import annotations

from pathlib import Path

from ipsecgate.lab.kernel import PACKAGE, fetch


def without_modules(cache: Path) -> None:
    """Put user-mode-linux into a lab cache without its modules, so that its first script fails."""
    real = fetch()
    home = cache / PACKAGE
    (home / "usr/bin").mkdir(parents=True)
    (home / "usr/bin/linux.uml").symlink_to(real.binary)
    (home / "usr/lib/uml/modules" / real.release).mkdir(parents=True)
