"""VICI's packets as bytes: what strongSwan sends, whole, or an error.

Rules of this module: bytes in, values out, no socket. Nothing is skipped and nothing is
guessed: an element of an unknown type, a name that occurs twice, or a length that runs out of
the packet makes the whole of it an error. What a lenient reader leaves out would not be protected.

    packet   kind (1), for an event its name (length 1, text), message
    message  elements: type (1), for all but an end a name (length 1, text), then
             SECTION_START  elements up to SECTION_END
             KEY_VALUE      length (2), bytes
             LIST_START     LIST_ITEM (1), length (2), bytes, repeated, up to LIST_END

Lengths are network order, names UTF-8, values bytes as they are.

Source: README.md of strongSwan's vici plugin, "Message format".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ipsecgate.core.codec.vici_sections import Section, ViciError

CMD_RESPONSE, CMD_UNKNOWN = 1, 2
EVENT_CONFIRM, EVENT_UNKNOWN, EVENT = 5, 6, 7
KINDS = frozenset({CMD_RESPONSE, CMD_UNKNOWN, EVENT_CONFIRM, EVENT_UNKNOWN, EVENT})
SECTION_START, SECTION_END, KEY_VALUE, LIST_START, LIST_ITEM, LIST_END = range(1, 7)
DEPTH = 16  # sections within each other; strongSwan's own are 4 deep


@dataclass(frozen=True, slots=True)
class Answer:
    """One packet from the daemon: `event` is its name, None for the answer to a command."""

    kind: int
    event: str | None
    message: Section


def parse(packet: bytes) -> Answer:
    """Parse a packet that a daemon sends. Raises: ViciError."""
    reader = _Reader(packet)
    kind = reader.number(1)
    if kind not in KINDS:
        raise reader.bad(f"packet type {kind}")
    event = reader.name() if kind == EVENT else None
    return Answer(kind, event, _message(reader))


def _message(reader: _Reader) -> Section:
    section: dict[str, Any] = {}
    outer: list[dict[str, Any]] = []
    while not reader.done:
        element = reader.number(1)
        if element == SECTION_END and outer:
            section = outer.pop()
            continue
        if element not in (SECTION_START, KEY_VALUE, LIST_START):
            raise reader.bad(f"element type {element}")
        name = reader.name()
        if name in section:
            raise reader.bad(f"second {name!r}")
        if element == KEY_VALUE:
            section[name] = reader.value()
        elif element == LIST_START:
            section[name] = _list(reader)
        else:
            outer.append(section)
            section[name] = section = {}
            if len(outer) > DEPTH:
                raise reader.bad(f"section {DEPTH + 1} deep")
    if outer:
        raise reader.bad("section without an end")
    return section


def _list(reader: _Reader) -> list[bytes]:
    items: list[bytes] = []
    while (element := reader.number(1)) == LIST_ITEM:
        items.append(reader.value())
    if element != LIST_END:
        raise reader.bad(f"element type {element} in a list")
    return items


class _Reader:
    """A packet's bytes, read from front to back."""

    def __init__(self, packet: bytes) -> None:
        self._packet = packet
        self._at = 0

    @property
    def done(self) -> bool:
        """Tell whether everything was read."""
        return self._at == len(self._packet)

    def bad(self, what: str) -> ViciError:
        """Return the error to raise for what was read last."""
        return ViciError(f"{what} before byte {self._at} of a packet of {len(self._packet)}")

    def take(self, size: int) -> bytes:
        """Read that many bytes. Raises: ViciError if there are fewer."""
        taken = self._packet[self._at : self._at + size]
        if len(taken) < size:
            raise self.bad(f"{size} bytes that are not there")
        self._at += size
        return taken

    def number(self, size: int) -> int:
        """Read a number of that many bytes."""
        return int.from_bytes(self.take(size))

    def name(self) -> str:
        """Read a name."""
        try:
            return self.take(self.number(1)).decode()
        except UnicodeDecodeError:
            raise self.bad("name that is not UTF-8") from None

    def value(self) -> bytes:
        """Read a value."""
        return self.take(self.number(2))
