"""Asks the kernel which CHILD_SAs send and receive nothing, when somebody wants to know."""

from __future__ import annotations

from ipsecgate.core.codec.netlink import DecodeError
from ipsecgate.core.gate.gate import Gate
from ipsecgate.core.state.silence import Silent, silent_children
from ipsecgate.edges.kernel import sas


async def silent(gate: Gate) -> list[Silent]:
    """Return the silent children; none if the kernel does no ESP or cannot be read."""
    established = (
        [] if gate.protection.in_userspace else gate.protection.kernel_state.all_established()
    )
    if not established:
        return []
    try:
        return silent_children(established, await sas.packets())
    except (OSError, DecodeError):
        return []  # it is a warning: the answer goes without
