"""Codec for NETLINK_XFRM: dumps of the host floor, and requests that set and delete its policies.

Source: linux/xfrm.h; struct xfrm_userpolicy_info, struct xfrm_userpolicy_id.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ipsecgate.core.codec.netlink import encode_request, messages
from ipsecgate.core.codec.xfrm import DELPOLICY, NEWPOLICY, UPDPOLICY
from ipsecgate.core.codec.xfrm_structures import POLICY_BLOCK, POLICY_SIZE, policy
from ipsecgate.core.model.ipsec import Direction, SpdEntry
from ipsecgate.core.model.policy import FLOOR_PRIORITY, FloorPolicy

_FAMILY = {4: 2, 6: 10}
_SELECTOR = struct.Struct("!16s16sHHHH")  # and then, in host order:
_REST = struct.Struct("=HBBB3xiI")
_LIFETIME = struct.pack("=8Q", *([2**64 - 1] * 4), *([0] * 4))  # XFRM_INF; no times
_POLICY = struct.Struct("=IIBBBB4x")
_PRIORITY = struct.Struct("=I")
_POLICY_ID = struct.Struct("=IB3x")


def decode_late(datagram: bytes) -> Iterator[SpdEntry]:
    """Yield those policies of a dump that have a floor's priority. Raises: DecodeError."""
    for message in messages(datagram):
        if message.type != NEWPOLICY:
            continue
        at = message.structure(POLICY_SIZE, "xfrm_userpolicy_info")
        if _PRIORITY.unpack_from(datagram, at + 152)[0] < FLOOR_PRIORITY:
            continue  # one of very many, perhaps: decode no more of it
        entry = policy(message, at, message.attributes(POLICY_SIZE))
        if entry is not None:
            yield entry


def encode_set(wanted: FloorPolicy, tag: int, sequence: int) -> bytes:
    """Encode XFRM_MSG_UPDPOLICY, which adds or replaces the policy."""
    action = POLICY_BLOCK if wanted.block else 0
    tail = _POLICY.pack(FLOOR_PRIORITY + wanted.place, 0, Direction.OUT, action, 0, 0)
    body = _selector(wanted, tag) + _LIFETIME + bytes(32) + tail
    return encode_request(UPDPOLICY, body, sequence)


def encode_delete(unwanted: FloorPolicy, tag: int, sequence: int) -> bytes:
    """Encode XFRM_MSG_DELPOLICY, by selector."""
    body = _selector(unwanted, tag) + _POLICY_ID.pack(0, Direction.OUT)
    return encode_request(DELPOLICY, body, sequence)


def _selector(policy: FloorPolicy, tag: int) -> bytes:
    """Return struct xfrm_selector, 56 bytes."""
    size = policy.dst.max_prefixlen // 8
    return _SELECTOR.pack(
        policy.dst.network_address.packed.ljust(16, b"\0"),
        tag.to_bytes(size).ljust(16, b"\0"),
        *policy.dport,
        *policy.sport,
    ) + _REST.pack(_FAMILY[policy.dst.version], policy.dst.prefixlen, 0, policy.proto, 0, 0)
