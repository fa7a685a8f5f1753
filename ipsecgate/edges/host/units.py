"""The installed units of systemd beside those that this version ships."""

from __future__ import annotations

import re
from pathlib import Path

from ipsecgate import trust
from ipsecgate.core.check.machine import Unit

_PACKAGE = Path(__file__).resolve().parents[2]
_RUNNING = Path("/run/systemd/system")
_FOLDERS = ("/etc/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system")
_PROPERTIES = "FragmentPath,UnitFileState,NeedDaemonReload"
# The installation fills in where the program is.
_PROGRAM = re.compile(r"(?<==)\S*(?=/ipsecgate [a-z])", re.MULTILINE)


def shipped() -> Path:
    """Return the folder of the units that this version ships: the package's, or a checkout's."""
    packaged = _PACKAGE / "_systemd"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "packaging" / "systemd"


def units() -> list[Unit]:
    """Return every unit that this version ships."""
    return [_unit(path) for path in sorted(shipped().glob("ipsecgate*"))]


def _unit(path: Path) -> Unit:
    shown = _show(path.name)
    file = Path(shown.get("FragmentPath") or next(map(str, _installed(path.name)), ""))
    text = file.read_text() if file.is_file() else None
    return Unit(
        path.name,
        text=None if text is None else _normal(text),
        shipped=_normal(path.read_text()),
        state=shown.get("UnitFileState", ""),
        needs_reload=shown.get("NeedDaemonReload") == "yes",
    )


def _installed(name: str) -> list[Path]:
    return [path for folder in _FOLDERS if (path := Path(folder, name)).is_file()]


def _show(name: str) -> dict[str, str]:
    """Return what systemd says of a unit; nothing if it does not run."""
    if not _RUNNING.is_dir():
        return {}
    try:
        run = trust.run(["systemctl", "show", f"--property={_PROPERTIES}", name])
    except OSError:
        return {}
    pairs = (line.partition("=") for line in run.stdout.splitlines())
    return {key: value for key, _, value in pairs}


def _normal(text: str) -> str:
    return _PROGRAM.sub("@bindir@", text)
