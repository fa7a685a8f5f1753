"""What the hooks' maps hold, as bytes: masks, entries, paths, events.

Rules of this module: each function mirrors one structure of bpf/gate.h. Numbers are in this
machine's order, addresses and ports in network order.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Container, Sequence
from functools import lru_cache

from ipsecgate.core.model.events import FlowRefused
from ipsecgate.core.model.flow import Address, Flow, FlowPath, Network, Origin
from ipsecgate.core.tables.layout import (
    EXPLAINED,
    INDEX,
    KEY_SIZE,
    NO_POLICY,
    NS,
    Entry,
    Key,
    LayoutError,
    PathFlag,
    Reason,
    State,
    address_bits,
    address_from_bits,
    key_hash,
    mix,
    pack_key,
    unpack_key,
)

_ANSWER = struct.Struct("=QQIII4x")
_ENTRY = struct.Struct(f"={KEY_SIZE}sQQ{_ANSWER.size}s{_ANSWER.size}s")
NOTHING = bytes(_ANSWER.size)
_WHERE = struct.Struct("!16x16s12xHBx8s")  # of struct gate_entry, its beginning
_RANK = struct.Struct("=Q")
_MASK = struct.Struct(f"={KEY_SIZE}sQ")
_ROUTE = struct.Struct("=IIII4s16s")
_PATH = struct.Struct("!16s16sIHBB")
_DECISION = struct.Struct(f"={KEY_SIZE}sQQI4x")  # of maps.bpf.c
_EVENT = struct.Struct(f"=QQQ{KEY_SIZE}sIIIIII16s")
# The latest deadline: the kernel takes lifetimes of centuries. The highest bit must be 0, because
# the hooks use it to order their reads (setting_after() in bpf/maps.bpf.c).
_LAST = 2**63 - 1
MASK_SIZE = _MASK.size
ENTRY_SIZE = _ENTRY.size
EVENT_SIZE = _EVENT.size
DECISION_SIZE = _DECISION.size
WORD = 4  # bytes
# Where the `id` of an entry's answers is, in such words.
ID_WORDS = tuple((KEY_SIZE + 16 + n * _ANSWER.size + 24) // WORD for n in range(2))
ROUTE_SIZE = _ROUTE.size
PATH_SIZE = _PATH.size
ORIGIN_BITS = 8 * (ROUTE_SIZE - 4 - 16)


def ports_setting(ports: Sequence[int]) -> int:
    """Return the value of GATE_IKE_PORTS for one or two UDP ports."""
    first, second = (*ports, 0)[:2]
    return first | second << 16


def pack_mask(mask: Key, table: int, number: int) -> bytes:
    """Return struct gate_mask, 56 bytes, of the mask that has this number in a table."""
    last = pack_key(Key(), table, number)[-8:]
    return _MASK.pack(pack_key(mask), int.from_bytes(last, sys.byteorder))


def unpack_mask(raw: bytes) -> Key:
    """Return the mask of a struct gate_mask. Raises: LayoutError."""
    if len(raw) != MASK_SIZE:
        raise LayoutError(f"mask of {len(raw)} bytes, expected {MASK_SIZE}")
    return unpack_key(raw[:KEY_SIZE])[2]


def pack_answer(entry: Entry, boot: int = 0) -> bytes:
    """Return struct gate_answer, 32 bytes; `boot`: when CLOCK_BOOTTIME was 0, wall clock ns."""
    deadline = min(max(1, entry.deadline * NS - boot), _LAST) if entry.deadline else 0
    return _ANSWER.pack(entry.rank, deadline, entry.state, entry.error, entry.id)


def unpack_answer(raw: bytes, boot: int = 0) -> Entry | None:
    """Read struct gate_answer; `boot` as for `pack_answer`; None: no entry. Raises: LayoutError."""
    if len(raw) != _ANSWER.size:
        raise LayoutError(f"answer of {len(raw)} bytes, expected {_ANSWER.size}")
    rank, deadline, state, error, policy = _ANSWER.unpack(raw)
    if state == 0:
        return None
    if state not in State.__members__.values():
        raise LayoutError(f"entry with state {state}")
    ends = max(1, round((deadline + boot) / NS)) if deadline else 0
    return Entry(State(state), error, policy, ends, rank)


def pack_entry(key: bytes, since: int, now: bytes, before: bytes = NOTHING) -> bytes:
    """Return struct gate_entry, 128 bytes, of two answers as `pack_answer` has them."""
    hash_ = key_hash(key)
    bound = mix(hash_, since)
    return _ENTRY.pack(key, hash_, since, _checked(now, bound), _checked(before, bound))


def _checked(answer: bytes, bound: int) -> bytes:
    return answer[:-4] + INDEX.pack(
        mix(mix(bound, *_RANK.unpack_from(answer)), _rest(answer)) & 0xFFFFFFFF
    )


@lru_cache(maxsize=1 << 10)
def _rest(answer: bytes) -> int:
    """Return the part of an answer's check that depends on nothing else; many entries share it."""
    _, deadline, state, error, policy = _ANSWER.unpack(answer)
    return mix(mix(deadline, error << 32 | state), policy)


def is_sound(raw: bytes, generation: int) -> bool:
    """Return whether an entry's hash and checks are right, and its last change is in force."""
    key, hash_, since, now, before = _ENTRY.unpack(raw)
    bound = mix(hash_, since)
    right = _checked(now, bound), _checked(before, bound)
    return since <= generation and hash_ == key_hash(key) and right == (now, before)


def unpack_entry(raw: bytes, generation: int) -> bytes:
    """Return the answer of a struct gate_entry in a generation: struct gate_answer, 32 bytes.

    Raises: LayoutError.
    """
    if len(raw) != ENTRY_SIZE:
        raise LayoutError(f"entry of {len(raw)} bytes, expected {ENTRY_SIZE}")
    _, _, since, now, before = _ENTRY.unpack(raw)
    return bytes(now if since <= generation else before)


def key_of_entry(raw: bytes) -> bytes:
    """Return the key of a struct gate_entry."""
    return raw[:KEY_SIZE]


def hash_of_entry(raw: bytes) -> int:
    """Return the hash in a struct gate_entry, which must be that of its key."""
    return int(_ENTRY.unpack(raw)[1])


def where_of_entry(raw: bytes) -> tuple[int, int, int, int]:
    """Return table, mask number, destination (128 bits) and hash of a struct gate_entry."""
    daddr, mask_number, table, hash_ = _WHERE.unpack_from(raw)
    return table, mask_number, int.from_bytes(daddr), int.from_bytes(hash_, sys.byteorder)


def without_sas(raw: bytes, tags: Container[int]) -> bytes:
    """Return a struct gate_entry with those answers dead that are live because of these SAs."""
    key, hash_, since, *answers = _ENTRY.unpack(raw)
    bound = mix(hash_, since)
    return _ENTRY.pack(key, hash_, since, *(_without_sas(one, tags, bound) for one in answers))


def _without_sas(answer: bytes, tags: Container[int], bound: int) -> bytes:
    rank, deadline, state, error, tag = _ANSWER.unpack(answer)
    if state != State.LIVE or tag not in tags:
        return answer
    return _checked(_ANSWER.pack(rank, deadline, State.DEAD, error, tag), bound)


def is_pending(raw: bytes, generation: int) -> bool:
    """Return whether a struct gate_entry holds a change that was never put in force."""
    return bool(_ENTRY.unpack(raw)[2] > generation)


def pack_route(origin: Origin, network: Network) -> bytes:
    """Return struct gate_route, the LPM key of a destination network for the flows of an origin."""
    prefix = ORIGIN_BITS + network.prefixlen + (96 if network.version == 4 else 0)
    bits = address_bits(network.network_address, network.version)
    low, high = origin.netns & 0xFFFFFFFF, origin.netns >> 32
    mark = origin.mark.to_bytes(4)
    return _ROUTE.pack(prefix, low, high, origin.device, mark, bits.to_bytes(16))


def origin_of_route(raw: bytes) -> Origin:
    """Return the origin in a struct gate_route. Raises: LayoutError."""
    if len(raw) != ROUTE_SIZE:
        raise LayoutError(f"route of {len(raw)} bytes, expected {ROUTE_SIZE}")
    _, low, high, device, mark, _ = _ROUTE.unpack(raw)
    return Origin(high << 32 | low, device, int.from_bytes(mark))


def pack_path(path: FlowPath) -> bytes:
    """Return struct gate_path."""
    flags = PathFlag.TUNNELED if path.is_tunneled else PathFlag(0)
    flags |= PathFlag.MARKED if path.mark is not None else PathFlag(0)
    flags |= PathFlag.TRANSLATED if path.translated is not None else PathFlag(0)
    return _PATH.pack(
        _packed_address(path.source),
        _packed_address(path.translated),
        path.mark or 0,
        path.if_id,
        flags,
        Reason.REFUSE_OUTSIDE if path.outside else 0,
    )


def _packed_address(address: Address | None) -> bytes:
    return (0 if address is None else address_bits(address, address.version)).to_bytes(16)


def unpack_path(raw: bytes, family: int) -> FlowPath:
    """Read struct gate_path, which has neither the rule that translates nor why a path is outside.

    Raises: LayoutError.
    """
    if len(raw) != PATH_SIZE:
        raise LayoutError(f"path of {len(raw)} bytes, expected {PATH_SIZE}")
    source, translated, mark, if_id, flags, reason = _PATH.unpack(raw)
    return FlowPath(
        _address(int.from_bytes(source), family),
        if_id,
        mark if flags & PathFlag.MARKED else None,
        _address(int.from_bytes(translated), family) if flags & PathFlag.TRANSLATED else None,
        EXPLAINED[Reason.REFUSE_OUTSIDE] if reason else "",
    )


def _address(bits: int, family: int) -> Address | None:
    return None if bits in (0, address_bits(None, family)) else address_from_bits(bits, family)


def unpack_refusal(raw: bytes) -> tuple[Flow, Reason] | None:
    """Read a key of the map `recent`: a flow without its source port, and why it was refused.

    None: no hook of this version wrote it. Raises: LayoutError.
    """
    _, number, key = unpack_key(raw)
    reason = int.from_bytes(number.to_bytes(2), sys.byteorder)  # in the place of a mask's number
    if key.family not in (4, 6) or reason not in EXPLAINED:
        return None
    return _flow(key), Reason(reason)


def unpack_decision(raw: bytes, generation: int) -> tuple[Flow, Reason] | None:
    """Read struct decision: a flow that was let go in this generation, and why; None: another."""
    flow, since, _deadline, reason = _DECISION.unpack(raw)
    _, _, key = unpack_key(flow)
    if since != generation or key.family not in (4, 6) or reason >= Reason.ALLOW_EXEMPT:
        return None
    return _flow(key), Reason(reason)


def _flow(key: Key, device: int = 0, netns: int = 0) -> Flow:
    return Flow(
        daddr=address_from_bits(key.daddr, key.family),
        proto=key.proto,
        dport=key.dport,
        saddr=_address(key.saddr, key.family),
        sport=key.sport,
        mark=key.mark,
        device=device,
        netns=netns,
    )


def unpack_event(record: bytes) -> FlowRefused:
    """Read struct gate_event. Raises: LayoutError naming the field."""
    if len(record) < EVENT_SIZE:
        raise LayoutError(f"event of {len(record)} bytes, expected {EVENT_SIZE}")
    ns, cgroup, netns, raw, reason, policy, pid, _hook, device, untold, comm = _EVENT.unpack_from(
        record
    )
    _, _, key = unpack_key(raw)
    if key.family not in (4, 6):
        raise LayoutError(f"event with address family {key.family}")
    if reason not in EXPLAINED:
        raise LayoutError(f"event with reason {reason}")
    return FlowRefused(
        flow=_flow(key, device, netns),
        reason=Reason(reason),
        policy=None if policy == NO_POLICY else policy,
        pid=pid,
        comm=comm.split(b"\0", 1)[0].decode(errors="replace"),
        cgroup=cgroup,
        at=ns / NS,
        untold=untold,
    )
