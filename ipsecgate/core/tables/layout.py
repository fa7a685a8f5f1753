"""The mirror of bpf/gate.h: its constants, and the key of a flow.

Rules of this module: every constant and enum member has the name and value that gate.h gives it;
tests/unit/test_gate_header.py compares them, and the offsets of the structures.
tests/system/test_layout.py compares the sizes with what the compiler makes of them. In Python an
address is a 128-bit integer (IPv4 as ::ffff:a.b.c.d), and ports are host-order integers; in the
maps both are in network order. `packed` has the other structures.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from ipaddress import IPv4Address, IPv6Address
from typing import Self

from ipsecgate.core.model.flow import Address, Flow, unmap
from ipsecgate.core.model.value import value
from ipsecgate.errors import GateError

LAYOUT = 7
MASKS = 4096
ENTRIES = 1 << 22
ROUTES = 1 << 17
TUNNELS = 4096
OTHERS = 1024
LINE = 16
MASK_BITS = 12
MARK_BITS = 20
PLACE_BITS = 23
PROBES = 32
GONE = 0xFFFFFFFF
LEVELS_V4 = 32

MAPS = (
    "settings", "masks", "entries", "slots", "paths", "tunnels", "others",
    "recent", "counters", "events", "decisions", "tags", "sockets",
)  # fmt: skip
SETTING = struct.Struct("=Q")
INDEX = struct.Struct("=I")  # of an array map

V4_MAPPED = 0xFFFF << 32
IF_IDS = 0xFFFF  # a flow's interface id has 16 bits
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
    PASS = 6
    DERIVED = 7


class Setting(IntEnum):
    """Indexes of the settings map."""

    POLICY_PUBLISHED = 0
    SPD_PUBLISHED = 1
    AUDIT = 2
    DENY = 3
    IKE = 4
    ERROR = 5
    VERSION = 6
    GENERATION = 7
    NETNS = 8
    PATHS = 9
    IKE_CGROUP = 10
    SLOTS = 11
    POLICY_LEVELS = 12
    SPD_LEVELS = 13
    MARKS = 14
    IKE_PORTS = 15


class Reason(IntEnum):
    """Why a flow was allowed or refused, or a packet blocked. The last three only count."""

    ALLOW_DEFAULT = 0
    ALLOW_BYPASS = 1
    ALLOW_COVERED = 2
    ALLOW_PASSED = 3
    ALLOW_ASSOCIATED = 4
    ALLOW_EXEMPT = 5
    ALLOW_OTHER = 6
    REFUSE_UNCOVERED = 7
    REFUSE_DISCARD = 8
    REFUSE_DEFAULT = 9
    REFUSE_NO_SOURCE = 10
    REFUSE_NOT_READY = 11
    REFUSE_NETNS = 12
    REFUSE_OUTSIDE = 13
    BLOCK_CLEAR = 14
    BLOCK_DISCARD = 15
    BLOCK_DEFAULT = 16
    BLOCK_NOT_READY = 17
    BLOCK_UNREADABLE = 18
    AUDITED = 19
    AUDITED_PACKETS = 20
    EVENTS_LOST = 21


class PathFlag(IntFlag):
    """What makes the kernel look up the SPD a second time for a flow."""

    TUNNELED = 1
    MARKED = 2
    TRANSLATED = 4


EXPLAINED = {
    Reason.REFUSE_UNCOVERED: "no live SA protects it",
    Reason.REFUSE_DISCARD: "its policy discards it",
    Reason.REFUSE_DEFAULT: "no policy matches it, and the default is deny",
    Reason.REFUSE_NO_SOURCE: "it has no route, or routing may choose another source address",
    Reason.REFUSE_NOT_READY: "the policies are not known yet, or change too fast for the hook",
    Reason.REFUSE_NETNS: "it is in another network namespace, whose routing is not known yet",
    Reason.REFUSE_OUTSIDE: "its packets would bypass this host's SPD",
    Reason.BLOCK_CLEAR: "a packet would have left in clear",
    Reason.BLOCK_DISCARD: "the packet's policy discards it",
    Reason.BLOCK_DEFAULT: "no policy matches the packet, and the default is deny",
    Reason.BLOCK_NOT_READY: "a packet was sent, but the policies are not known, or change too fast",
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
            "`systemctl restart ipsecgate` replaces them with the installed version's",
        )


class TooManyMasksError(LayoutError):
    """More masks than a table of the hooks holds."""

    def __init__(self, count: int, limit: int = MASKS) -> None:
        GateError.__init__(
            self,
            f"the hooks' maps: {count} masks, a table holds {limit}",
            hint="use fewer different prefix lengths, port ranges and marks",
        )


_KEY = struct.Struct("!16s16sHHBBHIHBx")  # struct gate_key
KEY_SIZE = _KEY.size
# Where each field lies in a key's number, which is the struct's bytes read as one, and its width.
_FIELDS = {
    "saddr": (256, 128),
    "daddr": (128, 128),
    "sport": (112, 16),
    "dport": (96, 16),
    "proto": (88, 8),
    "family": (80, 8),
    "if_id": (64, 16),
    "mark": (32, 32),
}
_MASK_NUMBER, _TABLE = 16, 8  # shifts of these two


class Key(int):
    """A flow, a mask, or a masked flow: struct gate_key without `table` and `mask_number`.

    It is the number that the struct's 48 bytes make, most significant first, so that one AND
    masks it: addresses of 128 bits, then ports, protocol, family (4 or 6), interface id and mark.
    """

    __slots__ = ()

    def __new__(  # noqa: PLR0917  the struct's fields, in its order
        cls,
        saddr: int = 0,
        daddr: int = 0,
        sport: int = 0,
        dport: int = 0,
        proto: int = 0,
        family: int = 0,
        mark: int = 0,
        if_id: int = 0,
    ) -> Self:
        """Put a key together from its fields."""
        return super().__new__(
            cls,
            saddr << 256 | daddr << 128 | sport << 112 | dport << 96
            | proto << 88 | family << 80 | if_id << 64 | mark << 32,
        )  # fmt: skip

    def masked(self, mask: Key) -> Key:
        """Return the bits that the mask keeps."""
        return int.__new__(Key, self & mask)

    def joined(self, other: Key) -> Key:
        """Return the bits of both."""
        return int.__new__(Key, self | other)

    def replaced(self, **values: int) -> Key:
        """Return the key with other fields."""
        return Key(**{name: values.get(name, getattr(self, name)) for name in _FIELDS})

    def _field(self, name: str) -> int:
        shift, width = _FIELDS[name]
        return self >> shift & (1 << width) - 1

    saddr = property(lambda self: self._field("saddr"), doc="Source address, 128 bits.")
    daddr = property(lambda self: self._field("daddr"), doc="Destination address, 128 bits.")
    sport = property(lambda self: self._field("sport"), doc="Source port; type for ICMP.")
    dport = property(lambda self: self._field("dport"), doc="Destination port; code for ICMP.")
    proto = property(lambda self: self._field("proto"), doc="IP protocol.")
    family = property(lambda self: self._field("family"), doc="4 or 6, 0 in an empty key.")
    if_id = property(lambda self: self._field("if_id"), doc="Interface id of an XFRM interface.")
    mark = property(lambda self: self._field("mark"), doc="SO_MARK.")

    def __getnewargs__(self) -> tuple[int, ...]:  # type: ignore[override]
        ordered = ("saddr", "daddr", "sport", "dport", "proto", "family", "mark", "if_id")
        return tuple(map(self._field, ordered))

    def __repr__(self) -> str:
        return "Key(" + ", ".join(f"{n}={self._field(n):#x}" for n in _FIELDS) + ")"


@value
class Entry:
    """struct gate_answer. `error` 0 is EPERM.

    `id`: in POLICY the index of a policy among those in force; in SPD, of a live entry, the tag of
    its SA (`core.state.spd.sa_tag`), 0 = unknown.
    `deadline`: when a live SA ends by itself, seconds of the wall clock since the epoch, 0 =
    never. In the map it is nanoseconds of CLOCK_BOOTTIME, which the hooks can read.
    `rank`: of all entries that match a flow the lowest wins, 64 bits.
    """

    state: State
    error: int = 0
    id: int = 0
    deadline: int = 0
    rank: int = 0


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
        flow.if_id,
    )


def pack_key(key: Key, table: int = 0, mask_number: int = 0) -> bytes:
    """Return struct gate_key, 48 bytes; the key of an entry has a table and a mask's number."""
    return int.to_bytes(key | mask_number << _MASK_NUMBER | table << _TABLE, KEY_SIZE)


def unpack_key(raw: bytes) -> tuple[int, int, Key]:
    """Return an entry's table, mask number and masked flow from its key. Raises: LayoutError."""
    if len(raw) != KEY_SIZE:
        raise LayoutError(f"key of {len(raw)} bytes, expected {KEY_SIZE}")
    saddr, daddr, sport, dport, proto, family, if_id, mark, mask_number, table = _KEY.unpack(raw)
    source, destination = int.from_bytes(saddr), int.from_bytes(daddr)
    return table, mask_number, Key(source, destination, sport, dport, proto, family, mark, if_id)


def key_hash(raw: bytes) -> int:
    """Return the hash of a packed key; for where its entry is, and for the entry's checks."""
    # As `mix` of gate.h does, word by word; a loop and calls would take twice as long.
    a, b, c, d, e, f = _WORDS.unpack(raw)
    one = a * _MULTIPLIER & _ALL_ONES
    one = ((one ^ one >> 32) ^ c) * _MULTIPLIER & _ALL_ONES
    one = ((one ^ one >> 32) ^ e) * _MULTIPLIER & _ALL_ONES
    two = b * _MULTIPLIER & _ALL_ONES
    two = ((two ^ two >> 32) ^ d) * _MULTIPLIER & _ALL_ONES
    two = ((two ^ two >> 32) ^ f) * _MULTIPLIER & _ALL_ONES
    return mix(one ^ one >> 32, two ^ two >> 32)


def mix(mixed: int, word: int) -> int:
    """Return a hash of a hash and a word, 64 bits each."""
    mixed = (mixed ^ word) * _MULTIPLIER & _ALL_ONES
    return mixed ^ mixed >> 32


_WORDS = struct.Struct(f"={KEY_SIZE // 8}Q")
_MULTIPLIER, _ALL_ONES = 0x9E3779B97F4A7C15, (1 << 64) - 1
