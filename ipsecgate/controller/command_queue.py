"""The gate's commands that wait to be carried out, and those that must not wait for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping

from ipsecgate.core.gate import commands as do
from ipsecgate.core.tables.layout import Entry, TableId
from ipsecgate.core.tables.table import Ternary

Entries = Mapping[Ternary, Entry | None]


class CommandQueue:
    """Commands in order, but each step's log messages and reports last: writing them takes time."""

    def __init__(self, cut: Callable[[TableId, Entries], dict[Ternary, Entry | None]]) -> None:
        """`cut`: `edges.bpf.tables.Tables.cut`."""
        self._cut = cut
        self._waiting: deque[do.Command] = deque()

    def put(self, commands: Iterable[do.Command]) -> None:
        """Add the commands of a step."""
        self._waiting.extend(sorted(commands, key=lambda one: isinstance(one, do.Log | do.Covered)))

    def take(self) -> do.Command | None:
        """Return the next command, None if there is none."""
        return self._waiting.popleft() if self._waiting else None

    def overtake(self, commands: Iterable[do.Command]) -> bool:
        """Add the commands of a step, and close now what they close; return whether they do.

        To be called while another command is being carried out.
        """
        closes, rest = False, list[do.Command]()
        for command in commands:
            if isinstance(command, do.Change):
                closes = True
                # What waits is older: it must not open again what is closed now.
                waiting = (one for one in self._waiting if not _verifies(command.table, one))
                self._waiting = deque(_with(command, one) for one in waiting)
                wait = self._cut(command.table, command.entries)
                rest += [do.Change(command.table, wait)] if wait else []
            else:
                rest.append(command)
        self.put(rest)
        return closes


def _verifies(table: TableId, command: do.Command) -> bool:
    """Tell whether a command compares a table, which is left to the next check a minute later."""
    return isinstance(command, do.Verify) and command.table is table


def _with(later: do.Change, command: do.Command) -> do.Command:
    """Return a command that waits, with what a later one makes of the same entries."""
    if not isinstance(command, do.Change) or command.table is not later.table:
        return command
    again = {match: now for match, now in later.entries.items() if match in command.entries}
    return do.Change(command.table, command.entries | again)
