"""A drop-in that has a systemd service start only when live SAs protect its peers.

Rules of this module: as few lines as possible, each with its reason. What is held (`hold`) is the
unit's own ExecStart=, as it is written there.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from ipsecgate.core.model.value import value
from ipsecgate.edges.host.config import Config
from ipsecgate.errors import GateError, UsageError

FOLDER = Path("/etc/systemd/system")
FILE = "ipsecgate.conf"
TARGET = "ipsecgate-online.target"
PROGRAM = "/usr/bin/ipsecgate"
_NAME = re.compile(r"[A-Za-z0-9:_.\\-]+(?:@[A-Za-z0-9:_.\\-]*)?")
# What `ipsecgate exec --user` does not set up as systemd does.
_LOST = ("Group", "SupplementaryGroups", "AmbientCapabilities", "PAMName")


@value
class Unit:
    """What systemd knows of a service. `starts`: its ExecStart= lines, as written."""

    name: str
    slice: str = "system.slice"
    user: str = ""
    starts: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()  # settings that a held command would not have


def name_of(written: str) -> str:
    """Return the full name of a service. Raises: UsageError."""
    name = written if written.endswith(".service") else f"{written}.service"
    if not _NAME.fullmatch(name.removesuffix(".service")):
        raise UsageError(f"{written!r} is not the name of a service")
    return name


def unit_of(name: str) -> Unit:
    """Ask systemd about a service. Raises: UsageError if there is none; GateError."""
    text = _systemctl("cat", name)
    keys = ("Slice", "User", "DynamicUser", *_LOST)
    shown = _systemctl("show", *(f"--property={key}" for key in keys), name)
    values = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    lost = [key for key in _LOST if values.get(key)]
    if values.get("DynamicUser") == "yes":
        lost.append("DynamicUser")
    slice_ = values.get("Slice") or "system.slice"
    return Unit(name, slice_, values.get("User", ""), tuple(starts(text)), tuple(lost))


def starts(text: str) -> list[str]:
    """Return the ExecStart= values in the output of `systemctl cat`, without this drop-in's own.

    An empty value resets those before it.
    """
    found: list[str] = []
    section, is_own = "", False
    for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines():
        line = line.strip()  # noqa: PLW2901
        if line.startswith("# /"):
            is_own = line.endswith(f"/{FILE}")
        elif line.startswith("["):
            section = line
        elif is_own:
            continue
        elif section == "[Service]" and (match := re.fullmatch(r"ExecStart\s*=\s*(.*)", line)):
            found = [*found, match[1]] if match[1] else []
    return found


def text_of(unit: Unit, config: Config | None, *, hold: bool) -> str:
    """Return the drop-in. `config` None: it cannot be read. Raises: UsageError."""
    option = " --hold" if hold else ""
    lines = [
        f"# Made by `ipsecgate unit-dropin {_short(unit)}{option}`.",
        "[Unit]",
        "# Start only when live SAs protect everything that the policies protect.",
        f"Requires={TARGET}",
        f"After={TARGET}",
    ]
    if hold:
        if config is None:
            raise UsageError(
                f"it is not known whether {unit.name} is gated: the configuration cannot be read",
                hint="`ipsecgate check` shows what is wrong with it",
            )
        if not is_gated(unit, config):
            raise UsageError(
                f"{unit.name} is not gated, so its calls cannot be held",
                hint=f'gate it first: cgroups = ["unit:{_short(unit)}"] in [gate]',
            )
        lines += ["", "[Service]", *_held(unit)]
    return "\n".join([*lines, "", *_gating(unit, config)]).rstrip() + "\n"


def install(unit: Unit, text: str, folder: Path = FOLDER) -> Path:
    """Write the drop-in and have systemd read it; return its path. Raises: GateError, OSError."""
    path = folder / f"{unit.name}.d" / FILE
    path.parent.mkdir(mode=0o755, exist_ok=True)
    beside = path.with_name(f".{FILE}.new")
    beside.write_text(text)
    os.chmod(beside, 0o644)  # noqa: PTH101
    beside.replace(path)
    _systemctl("daemon-reload")
    return path


def is_gated(unit: Unit, config: Config) -> bool:
    """Tell whether the configuration gates a service, wherever it is in the cgroup tree."""
    return config.host or any(_names(target, unit) for target in config.cgroups)


def _names(target: str, unit: Unit) -> bool:
    if target.startswith("unit:"):
        name = target.removeprefix("unit:")
        return unit.name == (name if "." in name else f"{name}.service")
    return Path(target).name in (unit.name, *_slices(unit.slice))


def _slices(name: str) -> Iterable[str]:
    """Yield a slice and those around it: a-b.slice is in a.slice. Source: systemd.slice(5)."""
    parts = name.removesuffix(".slice").split("-")
    return ("-".join(parts[:count]) + ".slice" for count in range(1, len(parts) + 1))


def _held(unit: Unit) -> Iterable[str]:
    """Yield the lines that run the unit's command under `ipsecgate exec`. Raises: UsageError."""
    if not unit.starts:
        raise UsageError(f"{unit.name} has no ExecStart= that could be held")
    if unit.user and unit.lost:
        raise UsageError(
            f"{unit.name} cannot be held: {unit.lost[0]}= would be lost",
            hint="without --hold its calls are refused until they are protected, which is as safe",
        )
    yield "# Its calls wait until an SA protects them, also later, when an SA is gone for a moment."
    yield "ExecStart="
    if unit.user:
        yield f"# It begins as root (`!`), to install the filter; --user makes it {unit.user}."
    for start in unit.starts:
        match = re.fullmatch(r"([-@:+!]*)(.*)", start)
        flags, command = (match[1], match[2]) if match else ("", start)
        if set(flags) - set("-:"):
            raise UsageError(f"{unit.name} cannot be held: ExecStart={start} has a special prefix")
        root, user = ("!", f" --user {unit.user}") if unit.user else ("", "")
        holder = f"{PROGRAM} exec --cgroup unit:{_short(unit)}{user}"
        yield f"ExecStart={flags}{root}{holder} -- {command}"


def _gating(unit: Unit, config: Config | None) -> Sequence[str]:
    """Return what the operator should know about how the service is gated, as comments."""
    if config is None:
        return [
            f"# The configuration cannot be read, so it is not known whether {unit.name} is gated:",
            "# `ipsecgate check` shows what is wrong with it.",
        ]
    if is_gated(unit, config):
        return [f"# The configuration gates {unit.name}: its calls never leave unprotected."]
    return [
        f"# {unit.name} is not gated: if an SA goes later, nothing refuses its calls.",
        "# Gate it in /etc/ipsecgate/ipsecgate.toml, then `systemctl reload ipsecgate`:",
        "#     [gate]",
        f'#     cgroups = ["unit:{_short(unit)}"]',
    ]


def _short(unit: Unit) -> str:
    return unit.name.removesuffix(".service")


def _systemctl(*words: str) -> str:
    try:
        done = subprocess.run(
            ["systemctl", "--no-pager", *words], capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise GateError("systemctl: not found", hint="this needs systemd") from error
    if done.returncode and words[0] == "cat":
        raise UsageError(f"systemd knows no {words[-1]}", hint="see `systemctl list-unit-files`")
    if done.returncode:
        raise GateError(f"systemctl {words[0]}: {done.stderr.strip()}")
    return done.stdout
