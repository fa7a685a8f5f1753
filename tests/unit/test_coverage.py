"""The transition table of a child's coverage: complete, and no other transition is possible."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from ipsecgate.core.gate.coverage import (
    TRANSITIONS,
    Coverage,
    IllegalTransitionError,
    Input,
    advance,
    mermaid,
)

ILLEGAL = {
    (Coverage.UNCOVERED, Input.SA_LOST),
    (Coverage.NEGOTIATING, Input.SA_LOST),
    (Coverage.BACK_OFF, Input.SA_LOST),
    (Coverage.UNCOVERED, Input.RETRY),
    (Coverage.NEGOTIATING, Input.RETRY),
    (Coverage.COVERED, Input.RETRY),
    (Coverage.COVERED, Input.SA_LIVE),
    (Coverage.UNCOVERED, Input.NARROWED),
    (Coverage.COVERED, Input.NARROWED),
    (Coverage.BACK_OFF, Input.NARROWED),
}


@pytest.mark.parametrize(("state", "event"), list(product(Coverage, Input)))
def test_every_transition_is_defined_or_illegal(state: Coverage, event: Input) -> None:
    if (state, event) in ILLEGAL:
        with pytest.raises(IllegalTransitionError):
            advance(state, event)
    else:
        assert advance(state, event) is TRANSITIONS[state, event]


def test_only_a_live_sa_leads_to_covered() -> None:
    into = {event for (state, event), to in TRANSITIONS.items()
            if to is Coverage.COVERED and state is not to}  # fmt: skip
    assert into == {Input.SA_LIVE}


def test_every_state_is_reachable_in_the_diagram() -> None:
    drawn = mermaid()
    for coverage in Coverage:
        assert f"--> {coverage.value.replace('-', '_')}" in drawn


def test_the_diagram_in_the_docs_is_current() -> None:
    page = (Path(__file__).parents[2] / "docs/coverage.md").read_text()
    assert f"```mermaid\n{mermaid()}```\n" in page
