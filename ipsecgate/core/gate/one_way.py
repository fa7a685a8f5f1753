"""CHILD_SAs of which the kernel has what leaves, and has lost what comes in.

Nothing of such a child is ever refused, so nobody asks for it anew, and IKE believes in it: what
leaves is protected, and every answer is dropped. A flush of the kernel's databases that meets an
SA just being installed leaves one. After a while the IKE daemon is told to delete it; the next
flow has it negotiated.

Rules of this module: while it is installed or deleted each child is half for a moment, so it must
be half, and on the daemon's list, both times that it is looked at. One that comes back half is
given longer each time, and at last left alone: what makes it so is not here.
"""

from __future__ import annotations

from collections.abc import Collection

from ipsecgate.core.gate import commands as do
from ipsecgate.core.model.events import Timer
from ipsecgate.core.model.ipsec import ChildName, ChildSa

FIRST = 2.0  # seconds that a child may be half; the next time twice as many
ATTEMPTS = 4  # in a row

Children = Collection[ChildSa]


class OneWayChildren:
    """The children that are half, from one look to the next."""

    def __init__(self) -> None:
        self._listed: frozenset[ChildSa] = frozenset()
        self._seen: dict[ChildName, set[ChildSa]] = {}  # while their timer runs
        self._attempts: dict[ChildName, int] = {}  # since the child was whole

    def look(self, established: Children, half: Children) -> list[do.Command]:
        """Take note of what is half of what the daemon lists now; `timer` looks a second time."""
        self._listed = frozenset(established)
        suspects: dict[ChildName, set[ChildSa]] = {}
        for sa in self._listed.intersection(half):
            suspects.setdefault(sa.name, set()).add(sa)
        for name in {sa.name for sa in self._listed} - suspects.keys():
            self._attempts.pop(name, None)
        commands: list[do.Command] = []
        for name in sorted(suspects.keys() - self._seen.keys()):
            attempt = self._attempts.get(name, 0)
            if attempt < ATTEMPTS:
                self._seen[name] = suspects[name]
                commands.append(do.StartTimer(Timer("one-way", name), FIRST * 2.0**attempt))
        return commands

    def timer(self, name: ChildName, half: Children) -> list[do.Command]:
        """Have those deleted that are half still."""
        still = self._seen.pop(name, set()).intersection(half, self._listed)
        if not still:
            return []
        self._attempts[name] = self._attempts.get(name, 0) + 1
        ordered = sorted(still, key=lambda sa: sa.unique)
        if self._attempts[name] == ATTEMPTS:
            return [
                _told(sa, f"this has happened {ATTEMPTS} times, so it is left alone")
                for sa in ordered
            ]
        return [command for sa in ordered for command in _delete(sa)]


def _delete(sa: ChildSa) -> list[do.Command]:
    return [
        _told(sa, "deleting the CHILD_SA, so that a new one is negotiated"),
        do.Terminate(sa.name, sa.unique),
    ]


def _told(sa: ChildSa, what_then: str) -> do.Command:
    lost = f"the kernel has lost its inbound SA ({sa.spi_in:08x}) or policy, and drops all replies"
    return do.Log("warning", f"{sa.name}: {lost}; {what_then}")
