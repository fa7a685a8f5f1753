"""The state of a CHILD_SA that the gate needs, as a transition table.

Rules of this module: what is not in the table is illegal, raises, and changes
nothing; the diagram in docs/ is generated from the table (`mermaid`).
"""

from __future__ import annotations

from enum import Enum


class Coverage(Enum):
    """Is there an SA for the flows that asked?"""

    UNCOVERED = "uncovered"
    NEGOTIATING = "negotiating"
    COVERED = "covered"
    BACK_OFF = "back-off"


class Input(Enum):
    """What moves a coverage."""

    ASKED = "a flow was refused"
    SA_LIVE = "winning policy and SA are in"
    SA_LOST = "no live SA any more"
    FAILED = "IKE failed, or the limit ran out"
    RETRY = "the back-off is over"
    IKE_GONE = "the IKE daemon is gone"


_U, _N, _C, _B = Coverage

TRANSITIONS: dict[tuple[Coverage, Input], Coverage] = {
    (_U, Input.ASKED): _N,
    (_N, Input.ASKED): _N,  # one negotiation, however many flows ask
    (_C, Input.ASKED): _C,  # refused a moment before it was opened
    (_B, Input.ASKED): _B,
    (_U, Input.SA_LIVE): _C,
    (_N, Input.SA_LIVE): _C,
    (_B, Input.SA_LIVE): _C,
    (_C, Input.SA_LOST): _U,
    (_N, Input.FAILED): _B,
    (_U, Input.FAILED): _U,  # a late failure of what was given up already
    (_C, Input.FAILED): _C,  # a duplicate failed beside the SA that is up
    (_B, Input.FAILED): _B,
    (_B, Input.RETRY): _U,  # the next refusal asks again
    (_U, Input.IKE_GONE): _U,
    (_N, Input.IKE_GONE): _U,
    (_C, Input.IKE_GONE): _U,
    (_B, Input.IKE_GONE): _U,
}


class IllegalTransitionError(RuntimeError):
    """An input that the state cannot have; a defect of the caller."""


def advance(state: Coverage, event: Input) -> Coverage:
    """Return the next state. Raises: IllegalTransitionError."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransitionError(f"{event.name} in state {state.value}") from None


def mermaid() -> str:
    """Draw the table; inputs that change nothing are left out."""
    lines = ["stateDiagram-v2", "    [*] --> uncovered"]
    for (state, event), target in TRANSITIONS.items():
        if state is not target:
            names = (state.value.replace("-", "_"), target.value.replace("-", "_"))
            lines.append(f"    {names[0]} --> {names[1]}: {event.value}")
    return "\n".join(lines) + "\n"
