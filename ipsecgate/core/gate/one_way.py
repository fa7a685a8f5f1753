"""CHILD_SAs whose inbound SA the kernel has lost: packets leave protected, every reply is dropped.

No flow of such a child is ever refused, so nothing would negotiate it again, and the IKE daemon
believes it to be up. A flush of the kernel's databases can leave one, if it meets an SA that is
just being installed. After a while we have the daemon delete it. Then the next flow is refused,
which starts a new negotiation.

Rules of this module: while a child is installed or deleted it is one-way for a moment, so it must
be one-way, and on the daemon's list, both now and when a timer fires. A child that becomes one-way
again is given more time each time, and at last left alone: we can't remove the cause.
"""

from __future__ import annotations

from collections.abc import Collection

from ipsecgate.core.gate import commands as do
from ipsecgate.core.model.events import Timer
from ipsecgate.core.model.ipsec import ChildName, ChildSa

FIRST = 2.0  # seconds that a child may be one-way; doubles with each attempt
ATTEMPTS = 4  # in a row

Children = Collection[ChildSa]


class OneWayChildren:
    """The one-way children, from one list of the daemon's to the next."""

    def __init__(self) -> None:
        self._listed: frozenset[ChildSa] = frozenset()
        self._suspects: dict[ChildName, set[ChildSa]] = {}  # while their timer runs
        self._attempts: dict[ChildName, int] = {}  # since the child was whole

    def listed(self, established: Children, one_way: Children) -> list[do.Command]:
        """Start a timer for each one-way child among those that the daemon lists now."""
        self._listed = frozenset(established)
        suspects: dict[ChildName, set[ChildSa]] = {}
        for sa in self._listed.intersection(one_way):
            suspects.setdefault(sa.name, set()).add(sa)
        for name in {sa.name for sa in self._listed} - suspects.keys():
            self._attempts.pop(name, None)
        commands: list[do.Command] = []
        for name in sorted(suspects.keys() - self._suspects.keys()):
            attempt = self._attempts.get(name, 0)
            if attempt < ATTEMPTS:
                self._suspects[name] = suspects[name]
                commands.append(do.StartTimer(Timer("one-way", name), FIRST * 2.0**attempt))
        return commands

    def timer_fired(self, name: ChildName, one_way: Children) -> list[do.Command]:
        """Delete the suspects that are still one-way."""
        still = self._suspects.pop(name, set()).intersection(one_way, self._listed)
        if not still:
            return []
        self._attempts[name] = self._attempts.get(name, 0) + 1
        ordered = sorted(still, key=lambda sa: sa.unique)
        if self._attempts[name] == ATTEMPTS:
            text = f"this has happened {ATTEMPTS} times, so it is left alone"
            return [_log(sa, text) for sa in ordered]
        return [command for sa in ordered for command in _delete(sa)]


def _delete(sa: ChildSa) -> list[do.Command]:
    return [
        _log(sa, "deleting the CHILD_SA, so that a new one is negotiated"),
        do.Terminate(sa.name, sa.unique),
    ]


def _log(sa: ChildSa, action: str) -> do.Command:
    lost = f"the kernel has lost its inbound SA ({sa.spi_in:08x}) or policy, and drops all replies"
    return do.Log("warning", f"child {sa.name}: {lost}; {action}")
