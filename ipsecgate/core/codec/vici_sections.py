"""A VICI message as nested sections, and typed access to its values.

A section maps names to values (bytes), lists of values, and further sections. A value of the
wrong kind is an error; a missing list or section is an empty one.

Source: README.md of strongSwan's vici plugin.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ipsecgate.errors import GateError

Section = Mapping[str, Any]

DIGITS = {10: re.compile(r"[0-9]{1,10}"), 16: re.compile(r"[0-9a-fA-F]{1,8}")}
"""A 32-bit number as strongSwan writes it, by base."""


class ViciError(GateError):
    """A VICI message that does not have the documented form."""

    def __init__(self, message: str) -> None:
        super().__init__(
            f"VICI: {message}",
            hint="use strongSwan 5.9 or later; else report a bug, with `swanctl --list-conns`",
        )


def text(section: Section, key: str) -> str:
    """Return a value as text. Raises: ViciError if it is missing."""
    value = section.get(key)
    if not isinstance(value, bytes):
        raise ViciError(f"no value {key!r} among {sorted(section)}")
    return value.decode(errors="replace")


def texts(section: Section, key: str) -> list[str]:
    """Return a list of values as text, empty if it is missing. Raises: ViciError."""
    values = section.get(key, [])
    if not isinstance(values, list):
        raise ViciError(f"{key!r} is not a list")
    return [item.decode(errors="replace") for item in values]


def number(section: Section, key: str, base: int = 10) -> int:
    """Return a 32-bit value. Raises: ViciError."""
    written = text(section, key)
    found = int(written, base) if DIGITS[base].fullmatch(written) else -1
    if not 0 <= found < 1 << 32:
        raise ViciError(f"{key!r} is not a number: {written[:40]!r}")
    return found


def subsection(section: Section, key: str) -> Section:
    """Return a section inside another, empty if it is missing. Raises: ViciError."""
    found = section.get(key, {})
    if not isinstance(found, Mapping):
        raise ViciError(f"{key!r} is not a section")
    return found


def sections(section: Section) -> Iterator[tuple[str, Section]]:
    """Yield the sections inside another, by name; skip the values beside them."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield name, value


def split_children(message: Section, children: str) -> Iterator[Section]:
    """Yield the message once for each child in its section `children`, without the others.

    Parsing each alone confines an error to one child: a peer that negotiates something that we
    cannot parse does not hide the SAs of the others.
    """
    for ike, body in message.items():
        found = body.get(children) if isinstance(body, Mapping) else None
        if not isinstance(found, Mapping):
            yield {ike: body}
            continue
        for name, child in found.items():
            yield {ike: {**body, children: {name: child}}}
