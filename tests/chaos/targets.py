"""The connections of the world, and the targets that its processes send to.

    net     tunnel mode over IPv4, with a trap        host    transport mode over IPv6, with a trap
    never   a connection that the peer does not know: always refused, never on the wire
    open    an address in no connection: always allowed, and on the wire in clear

The last two check the evidence itself: the capture must see the cleartext packets of `open`, and
calls to `never` must be refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_network

from ipsecgate.lab.hosts import ConnSpec, Lab

PORT, CLOSED_PORT = 7400, 7401
OPEN = "192.0.2.9"
NEVER = "192.0.2.3"
DPD = {"dpd_delay": "1"}
SPECS = (
    ConnSpec("net", "tunnel", 4, start_action="trap", options=DPD),
    ConnSpec("host", "transport", 6, start_action="trap", options=DPD),
)
NOWHERE = ConnSpec("never", "transport", 4, remote_ts=(f"{NEVER}/32",))
PROTECTED = [ip_network(text) for text in ("203.0.113.0/24", "2001:db8::2/128", f"{NEVER}/32")]
KINDS = ("fresh", "kept", "connected", "tcp", "stream", "ping", "raw")

Target = tuple[str, str, int]


def covered(lab: Lab, kinds: Sequence[str]) -> list[Target]:
    return [
        (kind, str(lab.b.address(spec)), CLOSED_PORT if kind in ("tcp", "connect") else PORT)
        for spec in SPECS
        for kind in kinds
    ]
