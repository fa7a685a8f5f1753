"""The children that strongSwan ever had loaded, kept on disk for a restart without it."""

from __future__ import annotations

import logging
from pathlib import Path

from ipsecgate.core.gate import commands as do
from ipsecgate.core.model.problem import Problem
from ipsecgate.edges.host import saved_state

log = logging.getLogger("ipsecgate")


class Remembered:
    """Writes one file; a write that fails is tried again by `retry`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._unwritten: do.Remember | None = None

    def execute(self, command: do.Remember) -> None:
        """Write the file; a failure is logged, and only matters at a restart."""
        self._unwritten = None
        try:
            saved_state.save_children(self._path, command.children)
        except OSError as error:
            self._unwritten = command
            log.error("cannot write %s: %s", self._path, error.strerror or error)

    def retry(self) -> None:
        """Write again if the last write failed."""
        if self._unwritten is not None:
            self.execute(self._unwritten)

    @property
    def errors(self) -> list[Problem]:
        """Return the problems that the operator should fix."""
        if self._unwritten is None:
            return []
        return [
            Problem(
                f"{self._path} cannot be written: after a restart without strongSwan "
                "the gate would protect the older set of policies that the file holds",
                "free some space on the disk, or make its folder writable; the log has the cause",
            )
        ]
