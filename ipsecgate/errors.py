"""The errors that a user sees: what is wrong, where, and what to do next.

There is one class for each exit code of the CLI. Any other exception that reaches the CLI, except
OSError, is a defect.
"""

from __future__ import annotations


class GateError(Exception):
    """A failure that the user can act on.

    `hint`: what to do next, or "". `evidence`: lines that show what happened, such as the end of a
    log; they are printed between the message and the hint.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", evidence: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        self.evidence = evidence

    def report(self) -> str:
        """Return message, evidence and hint as lines for a log."""
        lines = [str(self), *(f"  {line}" for line in self.evidence.splitlines())]
        return "\n".join([*lines, f"  next: {self.hint}"] if self.hint else lines)


class UsageError(GateError):
    """The configuration or an argument is invalid; nothing was changed."""

    exit_code = 2


class TimedOutError(GateError):
    """What was waited for did not happen in time."""

    exit_code = 124


START = "start the controller: `systemctl start ipsecgate`, or `ipsecgate run`"
"""What to do when none runs, or the hooks are not loaded."""


class NoControllerError(GateError):
    """No controller answers."""

    exit_code = 3


class KernelLacksError(GateError):
    """The kernel, or a file system or program of the machine, lacks what is needed."""

    exit_code = 4
