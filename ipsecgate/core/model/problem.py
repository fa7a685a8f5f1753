"""What is wrong, and what to do about it: the one shape of what an operator should mend."""

from __future__ import annotations

from typing import Self

from ipsecgate.core.model.value import value
from ipsecgate.errors import GateError


@value
class Problem:
    """`text`: what is wrong, in one line. `advice`: what to do next, "" if nothing is known."""

    text: str
    advice: str = ""

    @classmethod
    def of(cls, error: GateError) -> Self:
        """Return an error that was raised as a problem that lasts."""
        return cls(str(error), error.hint)

    def __str__(self) -> str:
        """Return both in one line, for the log."""
        return f"{self.text}. Next: {self.advice}" if self.advice else self.text


@value
class Cause(Problem):
    """Why a negotiation failed.

    `is_identity`: one side does not accept who the other is, or its proof. `unresolved`: the peer's
    name, if that has no address; else "".
    """

    is_identity: bool = False
    unresolved: str = ""
