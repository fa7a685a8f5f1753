"""The errors a user sees: what is wrong, where, and what to do about it.

One class per exit code of the CLI; everything else that escapes is a defect.
"""

from __future__ import annotations


class GateError(Exception):
    """Something failed that the user can act on. `hint` says how.

    `evidence`: lines that show what happened, such as the end of a log; they go
    between the message and the hint.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", evidence: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        self.evidence = evidence

    def report(self) -> str:
        """Return the error for a log: message, evidence and hint, a line each."""
        lines = [str(self), *(f"  {line}" for line in self.evidence.splitlines())]
        return "\n".join([*lines, f"hint: {self.hint}"] if self.hint else lines)


class UsageError(GateError):
    """A bad configuration or argument; nothing was changed."""

    exit_code = 2


class NoControllerError(GateError):
    """The verb needs a running controller."""

    exit_code = 3


class KernelLacksError(GateError):
    """The kernel, or a file system it offers, cannot do what is needed."""

    exit_code = 4
