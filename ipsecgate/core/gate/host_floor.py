"""The host floor: which policies the kernel should hold as XFRM block policies.

It follows the policies in force. In audit mode there is none; nor where the IKE daemon does ESP
itself, because it would block the daemon's own packets.
"""

from __future__ import annotations

from collections.abc import Iterable

from ipsecgate.core.gate import commands as do
from ipsecgate.core.model.flow import Address
from ipsecgate.core.model.ipsec import SpdEntry
from ipsecgate.core.model.policy import FloorPolicy, Policy, Settings
from ipsecgate.core.model.problem import Problem
from ipsecgate.core.state.floor import floor_policies, is_floor

NO_EFFECT = Problem(
    "gate.floor has no effect, because strongSwan does ESP: what the kernel sends on its own "
    "leaves in clear",
    'set `floor = "none"`, which accepts that',
)


class HostFloor:
    """The floor as it was last commanded."""

    def __init__(self) -> None:
        self._made_of: object = None
        self._wanted: tuple[FloorPolicy, ...] | None = None  # None: not commanded, or lost

    def update(
        self,
        policies: tuple[Policy, ...],
        settings: Settings,
        *,
        own: frozenset[Address],
        userspace_esp: bool,
    ) -> list[do.Command]:
        """Return the command that makes the floor follow these policies, if any is needed.

        `own`: the host's own addresses, to which nothing leaves the host.
        """
        wanted = settings.floor and not settings.audit and not userspace_esp
        made_of = (policies, own) if wanted else ()
        if self._wanted is not None and made_of == self._made_of:
            return []
        floor = floor_policies(policies, own) if wanted else ()
        changed, self._made_of, self._wanted = floor != self._wanted, made_of, floor
        return [do.SetFloor(floor)] if changed else []

    def compare(self, spd: Iterable[SpdEntry]) -> None:
        """Have the next `update` restore the floor if the kernel has lost part of it."""
        if self._wanted is not None:
            found = sum(is_floor(entry) for entry in spd)
            if found < len(self._wanted):
                self._wanted = None
