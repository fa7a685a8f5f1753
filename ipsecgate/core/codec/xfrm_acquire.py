"""Codec for NETLINK_XFRM: the ACQUIRE with which the kernel asks the IKE daemon for an SA.

The kernel accepts one from a process, too, and passes it on to whoever listens for ACQUIREs. No
packet is needed for it, so none can leave.

    xfrm_user_acquire (280)  0:id 24:saddr 40:sel 96:policy 264:aalgos 268:ealgos 272:calgos 276:seq
    XFRMA_TMPL               the policy's template: its reqid tells the daemon which trap it is

Source: linux/xfrm.h; xfrm_add_acquire() and build_acquire() in net/xfrm/xfrm_user.c.
"""

from __future__ import annotations

import struct

from ipsecgate.core.codec.netlink import encode_request
from ipsecgate.core.codec.xfrm_structures import XFRMA_TMPL
from ipsecgate.core.model.flow import PORT_MASK, Address, Flow
from ipsecgate.core.model.ipsec import Acquire, Direction

ACQUIRE = 0x17

_FAMILY = {4: 2, 6: 10}
_ID = struct.Struct("!16s4xB3x")
_SELECTOR = struct.Struct("!16s16sHHHH")  # and then, in host order:
_REST = struct.Struct("=HBBB3x8x")
_POLICY = struct.Struct("=64x32xIIBBBB4x")  # lifetimes, then priority, index, dir, action
_ALGORITHMS = struct.Struct("=4I")
_ANY = 0xFFFFFFFF
_ATTRIBUTE = struct.Struct("=HH")
_TEMPLATE = struct.Struct("=16s4xB3xH2x16sIBBBxIII")


def encode_acquire(acquire: Acquire, sequence: int) -> bytes:
    """Encode XFRM_MSG_ACQUIRE for a flow that has a source."""
    flow, template = acquire.flow, acquire.template
    if flow.saddr is None:
        raise ValueError(f"{flow} has no source address: resolve its route first")
    family = _FAMILY[flow.daddr.version]
    peer, here = _packed(template.daddr), _packed(template.saddr)
    selector = _selector(flow, flow.saddr)
    body = (
        _ID.pack(peer, template.proto)
        + _packed(flow.saddr)
        + selector
        + selector
        + _POLICY.pack(0, 0, Direction.OUT, 0, 0, 0)
        + _ALGORITHMS.pack(_ANY, _ANY, _ANY, 0)
    )
    mode, reqid = template.mode, template.reqid
    what = peer, template.proto, family, here, reqid, mode, 0, 0, _ANY, _ANY, _ANY
    attribute = _ATTRIBUTE.pack(_ATTRIBUTE.size + _TEMPLATE.size, XFRMA_TMPL)
    return encode_request(ACQUIRE, body + attribute + _TEMPLATE.pack(*what), sequence)


def _selector(flow: Flow, source: Address) -> bytes:
    """Return struct xfrm_selector, 56 bytes: exactly this flow."""
    ports = [word for port in (flow.dport, flow.sport) for word in (port, PORT_MASK if port else 0)]
    bits = flow.daddr.max_prefixlen
    return _SELECTOR.pack(_packed(flow.daddr), _packed(source), *ports) + _REST.pack(
        _FAMILY[flow.daddr.version], bits, bits, flow.proto
    )


def _packed(address: Address | None) -> bytes:
    return (b"" if address is None else address.packed).ljust(16, b"\0")
