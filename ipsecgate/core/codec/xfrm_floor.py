"""Codec for NETLINK_XFRM: the requests that set and delete policies of the host floor.

Source: linux/xfrm.h; struct xfrm_userpolicy_info, struct xfrm_userpolicy_id.
"""

from __future__ import annotations

import struct

from ipsecgate.core.codec.netlink import encode_request
from ipsecgate.core.codec.xfrm import DELPOLICY, UPDPOLICY
from ipsecgate.core.codec.xfrm_structures import POLICY_BLOCK
from ipsecgate.core.model.ipsec import Direction
from ipsecgate.core.model.policy import FLOOR_PRIORITY, FloorPolicy

_FAMILY = {4: 2, 6: 10}
_SELECTOR = struct.Struct("!16s16sHHHH")  # and then, in host order:
_REST = struct.Struct("=HBBB3xiI")
_LIFETIME = struct.pack("=8Q", *([2**64 - 1] * 4), *([0] * 4))  # XFRM_INF; no times
_POLICY = struct.Struct("=IIBBBB4x")
_POLICY_ID = struct.Struct("=IB3x")


def encode_set(policy: FloorPolicy, tag: int, sequence: int) -> bytes:
    """Encode XFRM_MSG_UPDPOLICY, which adds or replaces the policy."""
    action = POLICY_BLOCK if policy.block else 0
    tail = _POLICY.pack(FLOOR_PRIORITY + policy.place, 0, Direction.OUT, action, 0, 0)
    body = _selector(policy, tag) + _LIFETIME + bytes(32) + tail
    return encode_request(UPDPOLICY, body, sequence)


def encode_delete(policy: FloorPolicy, tag: int, sequence: int) -> bytes:
    """Encode XFRM_MSG_DELPOLICY, by selector."""
    body = _selector(policy, tag) + _POLICY_ID.pack(0, Direction.OUT)
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
