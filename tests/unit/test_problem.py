"""A problem and what to do about it, from where it arises to the answer on the control socket."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from ipsecgate.admin.answers import checked
from ipsecgate.admin.problem_document import problem_document
from ipsecgate.admin.status_document import ControllerStatus
from ipsecgate.controller import report
from ipsecgate.controller.tally import Tally
from ipsecgate.core.model import events as on
from ipsecgate.core.model.problem import Cause, Problem
from ipsecgate.errors import GateError, UsageError
from tests.typed_document import mismatches
from tests.unit.transcript import NAME, REFUSED, Transcript

GONE = Problem("strongSwan is not running", "start it")


def test_a_problem_is_one_line_in_the_log() -> None:
    assert str(GONE) == "strongSwan is not running. Next: start it"
    assert str(Problem("it is full")) == "it is full"


def test_an_error_becomes_a_problem_with_its_hint() -> None:
    error = UsageError("gate.mood: unknown key", hint="did you mean mode?")
    assert Problem.of(error) == Problem("gate.mood: unknown key", "did you mean mode?")
    assert problem_document(Cause.of(error)) == {"text": str(error), "advice": error.hint}


def answer(transcript: Transcript) -> dict[str, Any]:
    """Return a controller's answer to `status`, with an error of its own."""
    made: dict[str, Any] = report.controller_status(
        transcript.gate,
        {"pid": 1, "since": 2.0, "ready": True, "tasks": 3, "timers": 4},
        targets=[],
        namespaces=[],
        tally=Tally(),
        time_to_covered=[],
        changed_entries=0,
        errors=[Problem("the disk is full", "free some space")],
        silent=[],
    )  # type: ignore[assignment]
    return made


def test_the_controller_reports_problems(trapped: Transcript) -> None:
    trapped.after(REFUSED, on.NegotiationFailed(NAME, Cause("no key", "add it")))
    made = answer(trapped)
    assert mismatches(made, ControllerStatus) == []
    assert made["errors"] == [{"text": "the disk is full", "advice": "free some space"}]
    (negotiation,) = made["negotiations"]
    assert (negotiation["last_error"], negotiation["advice"]) == ("no key", "add it")
    trapped.after(on.IkeGone(GONE))
    assert answer(trapped)["errors"][0] == {"text": GONE.text, "advice": GONE.advice}


@pytest.fixture
def told(trapped: Transcript) -> dict[str, Any]:
    trapped.after(REFUSED, on.NegotiationFailed(NAME, Cause("no key", "add it")))
    return answer(trapped)


def test_an_answer_of_this_version_is_taken_as_it_is(told: dict[str, Any]) -> None:
    assert checked(told, ControllerStatus) is told


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda words: words.pop("errors"), "errors"),
        (lambda words: words.update(errors=["it is gone. Next: start it"]), "errors[0]"),
        (lambda words: words.update(errors="none"), "errors"),
        (lambda words: words["errors"][0].pop("advice"), "errors[0].advice"),
        (lambda words: words["errors"][0].update(text=7), "errors[0].text"),
        (lambda words: words["negotiations"][0].pop("failed_at"), "negotiations[0].failed_at"),
        (lambda words: words.update(policies=None), "policies"),
    ],
)  # fmt: skip
def test_an_answer_of_another_version_is_a_clear_error(
    told: dict[str, Any], change: Any, where: str
) -> None:
    words = copy.deepcopy(told)
    change(words)
    with pytest.raises(GateError) as caught:
        checked(words, ControllerStatus)
    assert str(caught.value) == (
        f"the controller is of another version: its answer has no valid {where}"
    )
    assert "systemctl restart ipsecgate" in caught.value.hint
