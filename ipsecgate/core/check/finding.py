"""What a check found, and how serious that is."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from ipsecgate.core.model.value import value

SHOWN = 3  # networks or names in one line


class State(Enum):
    """MISSING: without it the gate does not do what it should. WARNING: it does, but look at it."""

    OK = "ok"
    WARNING = "warning"
    MISSING = "missing"


@value
class Finding:
    """The result of one check; one check may have several.

    `hint`: what to do if it is not `ok`, in one line. `exit_code`: of `ipsecgate check`, if this
    is missing.
    """

    name: str
    state: State
    found: str
    hint: str = ""
    exit_code: int = 1


def ok(name: str, found: str) -> Finding:
    """Return that all is well."""
    return Finding(name, State.OK, found)


def warning(name: str, found: str, hint: str) -> Finding:
    """Return what may be wrong."""
    return Finding(name, State.WARNING, found, hint)


def missing(name: str, found: str, hint: str, exit_code: int = 1) -> Finding:
    """Return what is missing."""
    return Finding(name, State.MISSING, found, hint, exit_code)


def some(items: Iterable[object]) -> str:
    """Return the first few items as text."""
    texts = [str(item) for item in items]
    more = f" and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return ", ".join(texts[:SHOWN]) + more


def exit_code(findings: Iterable[Finding]) -> int:
    """Return the exit code of `ipsecgate check`: 0 if nothing is missing."""
    return max((one.exit_code for one in findings if one.state is State.MISSING), default=0)
