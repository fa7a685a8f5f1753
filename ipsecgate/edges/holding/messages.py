"""What inspector and controller say to each other: datagrams on a socket pair.

    inspector   I have started; I look at a call (once, until the controller watches); what about
                this flow?
    controller  a flow is free: its calls need not wait, until the epoch ends

Rule of this module: the controller treats what an inspector says as untrusted data.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from ipaddress import IPv6Address

from ipsecgate.core.model.flow import Address, Flow, unmap
from ipsecgate.core.model.value import value
from ipsecgate.edges.holding.look import Finding


class Kind(IntEnum):
    """What an inspector says."""

    STARTED = 0
    LOOKING = 1
    ASKED = 2  # about a call on a socket that does not block
    ASKED_BLOCKING = 3


# Kind; place in the call file, id and thread of the call; then its flow: protocol, ports of
# destination and source, mark, device, network namespace, destination, source. In host byte order;
# addresses are IPv6, or IPv4 mapped into it.
MESSAGE = struct.Struct("=BIQIBHHIIQ16s16s")
FREE = struct.Struct("=QQ")  # the epoch, and the id of a call that was asked about
NO_ADDRESS = bytes(16)
MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291 section 2.5.5.2
STARTED = MESSAGE.pack(Kind.STARTED, *bytes(9), NO_ADDRESS, NO_ADDRESS)
LOOKING = MESSAGE.pack(Kind.LOOKING, *bytes(9), NO_ADDRESS, NO_ADDRESS)


@value
class Question:
    """A call that needs a decision: its place in the call file, its id, and its thread."""

    place: int
    ident: int
    pid: int
    finding: Finding


def encode(question: Question) -> bytes:
    """Return a `MESSAGE` that asks about a call."""
    flow, blocking = question.finding
    return MESSAGE.pack(
        Kind.ASKED_BLOCKING if blocking else Kind.ASKED,
        question.place,
        question.ident,
        question.pid,
        flow.proto,
        flow.dport,
        flow.sport,
        flow.mark,
        flow.device,
        flow.netns,
        _packed(flow.daddr),
        _packed(flow.saddr),
    )


def decode(raw: bytes) -> Kind | Question | None:
    """Read a `MESSAGE`; None for bytes that are none."""
    if len(raw) != MESSAGE.size or raw[0] > Kind.ASKED_BLOCKING:
        return None
    kind, place, ident, pid, *rest = MESSAGE.unpack(raw)
    if kind < Kind.ASKED:
        return Kind(kind)
    proto, dport, sport, mark, device, netns, daddr, saddr = rest
    source = None if saddr == NO_ADDRESS else unmap(IPv6Address(saddr))
    flow = Flow(unmap(IPv6Address(daddr)), proto, dport, source, sport, mark, device, netns)
    return Question(place, ident, pid, Finding(flow, kind == Kind.ASKED_BLOCKING))


def _packed(address: Address | None) -> bytes:
    if address is None:
        return NO_ADDRESS
    return MAPPED + address.packed if address.version == 4 else address.packed
