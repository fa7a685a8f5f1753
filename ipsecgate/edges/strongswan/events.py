"""strongSwan's event packets as our events.

An event that cannot be read becomes `IkeUnparsed`. Packets of other types are ignored.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

from ipsecgate.core.codec.vici import child_rekey, child_updown, ike_updown
from ipsecgate.core.codec.vici_sections import ViciError
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


def is_loaded(answer: Answer) -> bool:
    """Return whether an event packet reports that a connection was loaded."""
    text = answer.message.get("msg") if answer.event == LOG else None
    return isinstance(text, bytes) and _LOADED in text


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
