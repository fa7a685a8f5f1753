"""How every document shows a `core.model.problem.Problem`."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from ipsecgate.core.model import problem


class Problem(TypedDict):
    """Something that keeps the gate from being healthy, or may, and what to do about it."""

    text: str
    advice: str  # "" if there is none


def problem_document(found: problem.Problem) -> Problem:
    """Return a problem as the documents have it."""
    return {"text": found.text, "advice": found.advice}
