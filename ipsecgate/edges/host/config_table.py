"""The tables and keys of the configuration, and the errors about them.

Every error names the file and the key; its hint is the correction or an example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import TypeVar

from ipsecgate.errors import UsageError

T = TypeVar("T")

GATE_KEYS = ("mode", "default", "cgroups", "host", "vici", "sa_source", "live_flows", "floor")
ERRNO_KEYS = ("uncovered", "negotiating", "failed", "hold_timeout")
POLICY_KEYS = ("name", "remote", "protocol", "port", "action", "child", "initiate")

# How to write each key: the hint of an error that has none of its own.
EXAMPLES = {
    "gate": "write a line [gate], and its keys below it",
    "errno": "write a line [errno], and its keys below it",
    "policy": "write a line [[policy]] for each policy, and its keys below it",
    "mode": 'for example: mode = "enforce"',
    "default": 'for example: default = "allow"',
    "cgroups": 'for example: cgroups = ["unit:postgresql", "/sys/fs/cgroup/web"]',
    "host": "for example: host = true",
    "vici": 'for example: vici = "/run/charon.vici"',
    "sa_source": 'for example: sa_source = "auto"',
    "live_flows": 'for example: live_flows = "block"',
    "floor": 'for example: floor = "none"',
    "uncovered": 'for example: uncovered = "EPERM"',
    "negotiating": 'for example: negotiating = "EPERM"',
    "failed": 'for example: failed = "EHOSTUNREACH"',
    "hold_timeout": 'for example: hold_timeout = "ETIMEDOUT"',
    "name": 'for example: name = "db"',
    "remote": 'for example: remote = ["10.2.0.0/16", "2001:db8:2::/48"]',
    "protocol": 'for example: protocol = "tcp"',
    "port": 'for example: port = "5432"',
    "action": 'for example: action = "protect"',
    "child": 'for example: child = "net-net"',
    "initiate": 'for example: initiate = "on-demand"',
}


class TomlTable:
    """A TOML table with its place in the file; `take` removes keys, `finish` rejects the rest.

    `line`: where it begins, 0 if unknown.
    """

    def __init__(self, data: object, file: Path, name: str, line: int = 0) -> None:
        self.file = file
        self.name = name
        self.origin = f"{file}:{line}" if line else f"{file}"
        if not isinstance(data, Mapping):
            hint = EXAMPLES.get(name.partition("[")[0], "")
            raise self.error("", f"must be a table, not {short(data)}", hint)
        self.data = dict(data)

    def error(self, key: str, message: str, hint: str = "") -> UsageError:
        """Return an error about a key, "" for the table itself."""
        where = ".".join(part for part in (self.name, key) if part)
        return UsageError(f"{self.file}: {where}: {message}", hint=hint or EXAMPLES.get(key, ""))

    def take(self, key: str, kind: type[T], default: T) -> T:
        """Remove a key and return its value, or the default. Raises: UsageError."""
        value = self.data.pop(key, default)
        if not isinstance(value, kind):
            raise self.error(key, f"must be {_KINDS[kind]}, not {short(value)}")
        if kind is str and "\0" in str(value):
            raise self.error(key, "must not contain a NUL character")
        return value

    def choice(self, key: str, options: Sequence[str], default: str) -> str:
        """Remove a key that has one of these values. Raises: UsageError."""
        value = self.take(key, str, default)
        if value not in options:
            raise self.error(
                key, f"{short(value)} is not one of {', '.join(options)}", _suggest(value, options)
            )
        return value

    def strings(self, key: str) -> list[str]:
        """Remove a key with a list of strings; [] if it is missing. Raises: UsageError."""
        values = self.take(key, list, [])
        for value in values:
            if not isinstance(value, str):
                raise self.error(key, f"must be a list of strings, but contains {short(value)}")
            if "\0" in value:
                raise self.error(key, f"must not contain a NUL character, as in {short(value)}")
        return values

    def parsed(self, key: str, text: str, parse: Callable[[str], T]) -> T:
        """Return what `parse` makes of a key's text. Raises: UsageError for its ValueError."""
        try:
            return parse(text)
        except ValueError as error:
            raise self.error(key, str(error)) from error

    def finish(self, known: Sequence[str]) -> None:
        """Raises: UsageError if a key was not taken; it suggests one of the known keys."""
        for key in self.data:
            hint = _suggest(key, known) or f"valid keys: {', '.join(known)}"
            raise self.error(key, "unknown key", hint)


_KINDS: dict[type, str] = {str: "a string", bool: "true or false", list: "a list", dict: "a table"}


def _suggest(text: str, options: Sequence[str]) -> str:
    from difflib import get_close_matches  # noqa: PLC0415 - only a mistake needs it

    near = get_close_matches(text, options, 1)
    return f"did you mean {near[0]!r}?" if near else ""
