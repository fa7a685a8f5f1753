"""The tables and keys of the configuration, and the errors about them.

Every error names the file and the key; its hint is the correction or an example.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from reprlib import repr as short
from typing import TypeVar

from ipsecgate.edges.host.config_keys import SECTIONS, Key, Section
from ipsecgate.errors import UsageError

T = TypeVar("T")


class TomlTable:
    """A TOML table with its place in the file; `finish` rejects what was not read.

    `name`: of its section, with a number if there are several; "" for the whole file.
    `line`: where it begins, 0 if unknown.
    """

    def __init__(self, data: object, file: Path, name: str, line: int = 0) -> None:
        self.file = file
        self.name = name
        self.origin = f"{file}:{line}" if line else f"{file}"
        section = SECTIONS.get(name.partition("[")[0])
        self.keys: Mapping[str, Key] = section.keys if section else {}
        if not isinstance(data, Mapping):
            raise self.error(
                "", f"must be a table, not {short(data)}", section.hint if section else ""
            )
        self.data = dict(data)

    def error(self, key: str, message: str, hint: str = "") -> UsageError:
        """Return an error about a key, "" for the table itself."""
        where = ".".join(part for part in (self.name, key) if part)
        known: Mapping[str, Key | Section] = self.keys if self.name else SECTIONS
        return UsageError(
            f"{self.file}: {where}: {message}",
            hint=hint or (known[key].hint if key in known else ""),
        )

    def section(self, name: str, kind: type[T], default: T) -> T:
        """Remove a section of the file and return it, or the default. Raises: UsageError."""
        return self._take(name, kind, default)

    def flag(self, key: str) -> bool:
        """Remove a key that is true or false. Raises: UsageError."""
        return self._take(key, bool, bool(self.keys[key].default))

    def text(self, key: str) -> str:
        """Remove a key with a string. Raises: UsageError."""
        value = self._take(key, str, str(self.keys[key].default))
        if "\0" in value:
            raise self.error(key, "must not contain a NUL character")
        return value

    def choice(self, key: str, default: str | None = None) -> str:
        """Remove a key that has choices; `default` replaces its own. Raises: UsageError."""
        if default is not None and key not in self.data:
            return default
        value, options = self.text(key), self.keys[key].choices
        if value not in options:
            raise self.error(
                key, f"{short(value)} is not one of {', '.join(options)}", _suggest(value, options)
            )
        return value

    def strings(self, key: str) -> list[str]:
        """Remove a key with a list of strings. Raises: UsageError."""
        values = self._take(key, list, [])
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

    def finish(self, known: Collection[str] = ()) -> None:
        """Raises: UsageError if a key was not read; it suggests one of the known keys."""
        known = known or self.keys
        for key in self.data:
            hint = _suggest(key, known) or f"valid keys: {', '.join(known)}"
            raise self.error(key, "unknown key", hint)

    def _take(self, key: str, kind: type[T], default: T) -> T:
        value = self.data.pop(key, default)
        if not isinstance(value, kind):
            raise self.error(key, f"must be {_KINDS[kind]}, not {short(value)}")
        return value


_KINDS: dict[type, str] = {str: "a string", bool: "true or false", list: "a list", dict: "a table"}


def _suggest(text: str, options: Collection[str]) -> str:
    from difflib import get_close_matches  # noqa: PLC0415 - only a mistake needs it

    near = get_close_matches(text, options, 1)
    return f"did you mean {near[0]!r}?" if near else ""
