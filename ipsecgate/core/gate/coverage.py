"""The coverage of a child, as a transition table.

Rules of this module: a transition that is not in the table raises and changes nothing. The diagram
in docs/coverage.md is generated from the table (`mermaid`).
"""

from __future__ import annotations

from enum import Enum


class Coverage(Enum):
    """Whether an SA covers the flow that asked for a child."""

    UNCOVERED = "uncovered"
    NEGOTIATING = "negotiating"
    COVERED = "covered"
    BACK_OFF = "back-off"


class Input(Enum):
    """What changes a coverage."""

    ASKED = "a flow was refused"
    SA_LIVE = "a live SA covers the flow"
    SA_LOST = "the SA is gone"
    FAILED = "IKE failed, or took too long"
    NARROWED = "the peer left the flow out"
    RETRY = "the back-off is over"
    IKE_GONE = "the IKE daemon is gone"


_U, _N, _C, _B = Coverage

TRANSITIONS: dict[tuple[Coverage, Input], Coverage] = {
    (_U, Input.ASKED): _N,
    (_N, Input.ASKED): _N,  # one negotiation, however many flows ask
    (_C, Input.ASKED): _C,  # refused just before it was opened
    (_B, Input.ASKED): _B,
    (_U, Input.SA_LIVE): _C,
    (_N, Input.SA_LIVE): _C,
    (_B, Input.SA_LIVE): _C,
    (_C, Input.SA_LOST): _U,
    (_N, Input.FAILED): _B,
    (_U, Input.FAILED): _U,  # a late report about a negotiation already given up
    (_C, Input.FAILED): _C,  # another attempt failed, and the SA is live
    (_B, Input.FAILED): _B,
    (_N, Input.NARROWED): _U,  # the part that was left out has a coverage of its own
    (_B, Input.RETRY): _U,  # the next refusal asks again
    (_U, Input.IKE_GONE): _U,
    (_N, Input.IKE_GONE): _U,
    (_C, Input.IKE_GONE): _U,
    (_B, Input.IKE_GONE): _U,
}


class IllegalTransitionError(RuntimeError):
    """An input that is impossible in this state: a defect of the caller."""


def advance(state: Coverage, event: Input) -> Coverage:
    """Return the next state. Raises: IllegalTransitionError."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransitionError(f"{event.name} in state {state.value}") from None


def mermaid() -> str:
    """Return the table as a Mermaid diagram, without the inputs that change nothing."""
    lines = ["stateDiagram-v2", "    [*] --> uncovered"]
    for (state, event), target in TRANSITIONS.items():
        if state is not target:
            names = (state.value.replace("-", "_"), target.value.replace("-", "_"))
            lines.append(f"    {names[0]} --> {names[1]}: {event.value}")
    return "\n".join(lines) + "\n"
