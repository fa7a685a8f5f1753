"""Decoder for VICI's packets.

Rules of this module: bytes in, values out; it opens no socket. It is strict: an unknown element
type, a repeated name, or a length beyond the end makes the whole packet an error. A selector that a
lenient decoder skipped would not be protected.

    packet   kind (1), for an event its name (length 1, text), message
    message  elements: type (1), for all but an end a name (length 1, text), then
             SECTION_START  elements up to SECTION_END
             KEY_VALUE      length (2), bytes
             LIST_START     LIST_ITEM (1), length (2), bytes, repeated, up to LIST_END

Lengths are in network order, names UTF-8, values arbitrary bytes.

Source: README.md of strongSwan's vici plugin, "Message format".
"""

from __future__ import annotations

from typing import Any

from ipsecgate.core.codec.vici_sections import Section, ViciError
from ipsecgate.core.model.value import value

CMD_RESPONSE, CMD_UNKNOWN = 1, 2
EVENT_CONFIRM, EVENT_UNKNOWN, EVENT = 5, 6, 7
KINDS = frozenset({CMD_RESPONSE, CMD_UNKNOWN, EVENT_CONFIRM, EVENT_UNKNOWN, EVENT})
SECTION_START, SECTION_END, KEY_VALUE, LIST_START, LIST_ITEM, LIST_END = range(1, 7)
DEPTH = 16  # of nested sections; strongSwan nests 4


@value
class Answer:
    """A packet from the daemon. `event` is an event's name, None for the reply to a command."""

    kind: int
    event: str | None
    message: Section


def parse(packet: bytes) -> Answer:
    """Decode a packet from the daemon. Raises: ViciError."""
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
    """A cursor over a packet's bytes."""

    def __init__(self, packet: bytes) -> None:
        self._packet = packet
        self._at = 0

    @property
    def done(self) -> bool:
        """Whether the packet ends here."""
        return self._at == len(self._packet)

    def bad(self, what: str) -> ViciError:
        """Return the error to raise for the element that was read last."""
        return ViciError(f"{what} before byte {self._at} of a packet of {len(self._packet)}")

    def take(self, size: int) -> bytes:
        """Read `size` bytes. Raises: ViciError if fewer are left."""
        taken = self._packet[self._at : self._at + size]
        if len(taken) < size:
            raise self.bad(f"{size} bytes that are not there")
        self._at += size
        return taken

    def number(self, size: int) -> int:
        """Read an unsigned number of `size` bytes."""
        return int.from_bytes(self.take(size))

    def name(self) -> str:
        """Read a name: its length (1 byte) and UTF-8 text. Raises: ViciError."""
        try:
            return self.take(self.number(1)).decode()
        except UnicodeDecodeError:
            raise self.bad("name that is not UTF-8") from None

    def value(self) -> bytes:
        """Read a value: its length (2 bytes) and bytes."""
        return self.take(self.number(2))
