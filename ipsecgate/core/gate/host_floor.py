"""The host floor: which policies the kernel should hold as XFRM block policies.

It follows the policies in force. In audit mode there is none; nor where the IKE daemon does ESP
itself, because it would block the daemon's own packets.
"""

from __future__ import annotations

from collections.abc import Iterable

from ipsecgate.core.gate import commands as do
from ipsecgate.core.model.ipsec import SpdEntry
from ipsecgate.core.model.policy import Policy, Settings
from ipsecgate.core.state.floor import floor_policies, is_floor


class HostFloor:
    """The floor as it was last commanded."""

    def __init__(self) -> None:
        self._policies: tuple[Policy, ...] | None = None  # None: not commanded, or lost

    def update(
        self, policies: tuple[Policy, ...], settings: Settings, *, userspace_esp: bool
    ) -> list[do.Command]:
        """Return the command that makes the floor follow these policies, if any is needed."""
        wanted = settings.floor and not settings.audit and not userspace_esp
        policies = policies if wanted else ()
        if policies == self._policies:
            return []
        self._policies = policies
        return [do.SetFloor(floor_policies(policies))]

    def compare(self, spd: Iterable[SpdEntry]) -> None:
        """Have the next `update` restore the floor if the kernel has lost part of it."""
        if self._policies is not None:
            found = sum(is_floor(entry) for entry in spd)
            if found < len(floor_policies(self._policies)):
                self._policies = None
