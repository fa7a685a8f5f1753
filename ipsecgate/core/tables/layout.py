"""The mirror of bpf/gate.h: the hooks' maps and events as bytes.

Rules of this module: every constant and enum member has the name and value that gate.h gives it;
tests/unit/test_gate_header.py compares them, and the offsets of the structures.
tests/system/test_layout.py compares the sizes with what the compiler makes of them. In Python an
address is a 128-bit integer (IPv4 as ::ffff:a.b.c.d), and ports are host-order integers; in the
maps both are in network order.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address

from ipsecgate.core.model.events import FlowRefused
from ipsecgate.core.model.flow import Address, Flow, Network, unmap
from ipsecgate.errors import GateError

LAYOUT = 3
BUFFERS = 4
TUPLES = 32
ENTRIES = 65536
SOURCES = 16384

MAPS = ("settings", "masks", "entries", "sources", "recent", "counters", "events", "sockets")

V4_MAPPED = 0xFFFF << 32
NS = 1_000_000_000


class TableId(IntEnum):
    """The two tables in which the hooks look up a flow."""

    POLICY = 0
    SPD = 1


class State(IntEnum):
    """The state of a table's entry, which holds for the flows that match it."""

    PROTECT = 1
    BYPASS = 2
    DISCARD = 3
    LIVE = 4
    DEAD = 5


class Setting(IntEnum):
    """Indexes of the settings map."""

    POLICY_EPOCH = 0
    SPD_EPOCH = 1
    AUDIT = 2
    DENY = 3
    IKE = 4
    ERROR = 5
    VERSION = 6
    GENERATION = 7
    NETNS = 8
    TUN = 9
    IKE_CGROUP = 10


class Reason(IntEnum):
    """Why a flow was allowed or refused, or a packet blocked. The last three only count."""

    ALLOW_DEFAULT = 0
    ALLOW_BYPASS = 1
    ALLOW_COVERED = 2
    ALLOW_ASSOCIATED = 3
    ALLOW_EXEMPT = 4
    REFUSE_UNCOVERED = 5
    REFUSE_DISCARD = 6
    REFUSE_DEFAULT = 7
    REFUSE_NO_SOURCE = 8
    REFUSE_NOT_READY = 9
    REFUSE_NETNS = 10
    BLOCK_CLEAR = 11
    BLOCK_DISCARD = 12
    BLOCK_DEFAULT = 13
    BLOCK_NOT_READY = 14
    BLOCK_UNREADABLE = 15
    AUDITED = 16
    AUDITED_PACKETS = 17
    EVENTS_LOST = 18


EXPLAINED = {
    Reason.REFUSE_UNCOVERED: "no live SA protects it",
    Reason.REFUSE_DISCARD: "its policy discards it",
    Reason.REFUSE_DEFAULT: "no policy matches it, and the default is deny",
    Reason.REFUSE_NO_SOURCE: "it has no route, or routing may choose another source address",
    Reason.REFUSE_NOT_READY: "the policies are not known yet",
    Reason.REFUSE_NETNS: "it is in another network namespace, whose SPD is unknown",
    Reason.BLOCK_CLEAR: "a packet would have left in clear",
    Reason.BLOCK_DISCARD: "the packet's policy discards it",
    Reason.BLOCK_DEFAULT: "no policy matches the packet, and the default is deny",
    Reason.BLOCK_NOT_READY: "a packet was sent, and the policies are not known yet",
    Reason.BLOCK_UNREADABLE: "the packet is a later fragment or has a source route",
}
"""The reasons that events have, explained to the operator."""

COUNTERS = len(Reason)
NO_POLICY = 0xFFFFFFFF


class LayoutError(GateError):
    """Bytes that no hook of this layout can have written."""

    def __init__(self, message: str) -> None:
        super().__init__(
            f"the hooks' maps: {message}",
            hint="the hooks are of another version, and keep refusing what no SA covers; "
            "`ipsecgate run` of the installed version replaces them",
        )


@dataclass(frozen=True, slots=True)
class Key:
    """struct gate_key without `space` and `tuple`: a flow, a mask, or a masked flow."""

    saddr: int = 0
    daddr: int = 0
    sport: int = 0
    dport: int = 0
    proto: int = 0
    family: int = 0
    mark: int = 0

    def masked(self, mask: Key) -> Key:
        """Return the key with only the bits of the mask."""
        return Key(*(getattr(self, f.name) & getattr(mask, f.name) for f in fields(Key)))


@dataclass(frozen=True, slots=True)
class Entry:
    """struct gate_entry. `error` 0 is EPERM; `id` is a policy's place in the configuration.

    `deadline`: when the SA expires, wall clock, seconds since the epoch; 0: never. In the map it is
    in nanoseconds of CLOCK_BOOTTIME, which the hooks can read.
    """

    state: State
    error: int = 0
    id: int = 0
    deadline: int = 0


_KEY = struct.Struct("!16s16sHHBBBB")  # and then:
_MARK = struct.Struct("=I")
_ENTRY = struct.Struct("=III4xQ")
_ROUTE = struct.Struct("=I16s")
_EVENT = struct.Struct("=QQ44sIIII16s4x")  # the compiler pads it to a multiple of 8
_LAST = 2**64 - 1  # the kernel accepts lifetimes of centuries: the latest deadline that fits
SETTING = struct.Struct("=Q")
INDEX = struct.Struct("=I")
KEY_SIZE = _KEY.size + _MARK.size
ENTRY_SIZE = _ENTRY.size
EVENT_SIZE = _EVENT.size
ROUTE_SIZE = _ROUTE.size
MASKS_SIZE = KEY_SIZE * TUPLES
SPACE_OFFSET = 38  # of gate_key


def address_bits(address: Address | None, family: int) -> int:
    """Return the 128 bits of an address, as in the maps; None is the unspecified address."""
    if address is None:
        return V4_MAPPED if family == 4 else 0
    return V4_MAPPED | int(address) if address.version == 4 else int(address)


def address_from_bits(bits: int, family: int) -> Address:
    """Return the address of 128 bits, the inverse of `address_bits`."""
    return IPv4Address(bits & 0xFFFFFFFF) if family == 4 else IPv6Address(bits)


def flow_key(flow: Flow) -> Key:
    """Return the key under which the hook looks up a flow."""
    daddr = unmap(flow.daddr)
    family = daddr.version
    return Key(
        address_bits(flow.saddr, family),
        address_bits(daddr, family),
        flow.sport,
        flow.dport,
        flow.proto,
        family,
        flow.mark,
    )


def pack_key(key: Key, space: int = 0, tuple_: int = 0) -> bytes:
    """Return struct gate_key, 44 bytes."""
    return _KEY.pack(
        key.saddr.to_bytes(16),
        key.daddr.to_bytes(16),
        key.sport,
        key.dport,
        key.proto,
        key.family,
        space,
        tuple_,
    ) + _MARK.pack(key.mark)


def unpack_key(raw: bytes) -> tuple[int, Key]:
    """Return the tuple and the masked flow of struct gate_key. Raises: LayoutError."""
    if len(raw) != KEY_SIZE:
        raise LayoutError(f"key of {len(raw)} bytes, expected {KEY_SIZE}")
    saddr, daddr, sport, dport, proto, family, _space, tuple_ = _KEY.unpack_from(raw)
    (mark,) = _MARK.unpack_from(raw, _KEY.size)
    source, destination = int.from_bytes(saddr), int.from_bytes(daddr)
    return tuple_, Key(source, destination, sport, dport, proto, family, mark)


def unpack_masks(raw: bytes) -> tuple[Key, ...]:
    """Return the masks of struct gate_masks that are in use, in order. Raises: LayoutError."""
    if len(raw) not in (0, MASKS_SIZE):
        raise LayoutError(f"masks of {len(raw)} bytes, expected {MASKS_SIZE}")
    masks = []
    for (chunk,) in struct.iter_unpack(f"{KEY_SIZE}s", raw):
        used, mask = unpack_key(chunk)
        if not used:
            break
        masks.append(mask)
    return tuple(masks)


def unpack_entry(raw: bytes, boot: int = 0) -> Entry:
    """Read struct gate_entry; `boot` as for `pack_entry`. Raises: LayoutError."""
    if len(raw) != ENTRY_SIZE:
        raise LayoutError(f"entry of {len(raw)} bytes, expected {ENTRY_SIZE}")
    state, error, policy, deadline = _ENTRY.unpack(raw)
    if state not in State.__members__.values():
        raise LayoutError(f"entry with state {state}")
    return Entry(State(state), error, policy, round((deadline + boot) / NS) if deadline else 0)


def pack_masks(masks: tuple[Key, ...]) -> bytes:
    """Return struct gate_masks, filled up with unused masks. Raises: LayoutError if too many."""
    if len(masks) > TUPLES:
        raise LayoutError(f"{len(masks)} masks, the table holds {TUPLES}")
    return b"".join(pack_key(mask, tuple_=1) for mask in masks).ljust(MASKS_SIZE, b"\0")


def pack_entry(entry: Entry, boot: int = 0) -> bytes:
    """Return struct gate_entry, 24 bytes. `boot`: the wall clock at CLOCK_BOOTTIME 0, in ns."""
    deadline = min(max(1, entry.deadline * NS - boot), _LAST) if entry.deadline else 0
    return _ENTRY.pack(entry.state, entry.error, entry.id, deadline)


def pack_route(network: Network) -> bytes:
    """Return struct gate_route, the LPM key of a destination network."""
    prefix = network.prefixlen + (96 if network.version == 4 else 0)
    bits = address_bits(network.network_address, network.version)
    return _ROUTE.pack(prefix, bits.to_bytes(16))


def pack_source(source: Address | None) -> bytes:
    """Return struct gate_source; None (no route) is all zero."""
    return (0 if source is None else address_bits(source, source.version)).to_bytes(16)


def space(table: TableId, epoch: int) -> int:
    """Return the space that holds the masks and entries of a table's epoch."""
    return table * BUFFERS + epoch % BUFFERS


def unpack_event(record: bytes) -> FlowRefused:
    """Read struct gate_event. Raises: LayoutError naming the field."""
    if len(record) < EVENT_SIZE:
        raise LayoutError(f"event of {len(record)} bytes, expected {EVENT_SIZE}")
    _ns, cgroup, raw, reason, policy, pid, _hook, comm = _EVENT.unpack_from(record)
    _, key = unpack_key(raw)
    if key.family not in (4, 6):
        raise LayoutError(f"event with address family {key.family}")
    if reason not in EXPLAINED:
        raise LayoutError(f"event with reason {reason}")
    unbound = key.saddr == address_bits(None, key.family)
    flow = Flow(
        daddr=address_from_bits(key.daddr, key.family),
        proto=key.proto,
        dport=key.dport,
        saddr=None if unbound else address_from_bits(key.saddr, key.family),
        sport=key.sport,
        mark=key.mark,
    )
    return FlowRefused(
        flow=flow,
        reason=Reason(reason),
        policy=None if policy == NO_POLICY else policy,
        pid=pid,
        comm=comm.split(b"\0", 1)[0].decode(errors="replace"),
        cgroup=cgroup,
    )
