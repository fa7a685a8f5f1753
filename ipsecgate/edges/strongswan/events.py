"""strongSwan's event packets as our events.

An event that cannot be read becomes `IkeUnparsed`. Packets of other types are ignored.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import NamedTuple

from ipsecgate.core.codec.vici import child_rekey, child_updown, ike_updown
from ipsecgate.core.codec.vici_sections import ViciError, number, text
from ipsecgate.core.codec.vici_selectors import Names
from ipsecgate.core.codec.vici_wire import Answer
from ipsecgate.core.model.events import IkeEvent, IkeUnparsed

TYPES = ("child-updown", "child-rekey", "ike-updown")
LOG = "log"  # what charon logs; it has no event for connections that are loaded, but logs them
_LOADED = b" vici connection"  # "added", "updated", "replaced"; source: vici_config.c

# Selectors may name protocols and services.
NAMES = Names(
    protocol=socket.getprotobyname,
    service=lambda name, protocol: (
        socket.getservbyname(name, protocol) if protocol else socket.getservbyname(name)
    ),
)


class LogLine(NamedTuple):
    """A line of the daemon's log about one IKE_SA: its configuration, its number, the text."""

    ike: str
    unique: int
    text: str


def is_loaded(answer: Answer) -> bool:
    """Return whether an event packet reports that a connection was loaded."""
    line = answer.message.get("msg") if answer.event == LOG else None
    return isinstance(line, bytes) and _LOADED in line


def log_line(answer: Answer) -> LogLine | None:
    """Return the line of the log in an event packet, None if it has none about an IKE_SA."""
    if answer.event != LOG:
        return None
    try:
        unique = number(answer.message, "ikesa-uniqueid")
        return LogLine(text(answer.message, "ikesa-name"), unique, text(answer.message, "msg"))
    except ViciError:
        return None


def read_events(answer: Answer) -> list[IkeEvent]:
    """Return what an event packet reports."""
    try:
        return list(_events(answer))
    except ViciError as error:
        return [IkeUnparsed(str(error))]


def _events(answer: Answer) -> Iterator[IkeEvent]:
    """Raises: ViciError."""
    match answer.event:
        case "child-updown":
            yield from child_updown(answer.message, NAMES)
        case "child-rekey":
            yield from child_rekey(answer.message, NAMES)
        case "ike-updown":
            yield from ike_updown(answer.message)
