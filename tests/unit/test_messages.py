"""Errors and results: whole words on a terminal, one line in a pipe, and the next step."""

from __future__ import annotations

import pytest

from ipsecgate.cli import main
from ipsecgate.cli.messages import explain, wrapped
from ipsecgate.cli.verbs import GROUPS, Verbs
from ipsecgate.errors import GateError, UsageError

LONG = "the pins of instance 'default' are of another version, " * 3 + "ipsecgate-load.service"
PATH = "/sys/fs/cgroup/" + "x" * 100


@pytest.mark.parametrize("width", range(24, 150, 9))
def test_a_terminal_gets_whole_words(width: int) -> None:
    lines = wrapped(f"  {LONG}", width).split("\n")
    assert max(map(len, lines)) <= max(width, len("    ipsecgate-load.service"))
    assert " ".join(" ".join(lines).split()) == LONG
    assert all(line.startswith("    ") for line in lines[1:])


def test_a_pipe_gets_one_line_and_a_path_stays_whole() -> None:
    assert wrapped(LONG, None) == LONG
    assert f"  {PATH}" in wrapped(f"no cgroup {PATH}", 40).split("\n")


ERROR = GateError("not covered after 5 s: " + "why " * 20, hint="do " * 30, evidence="log " * 30)


def test_an_error_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    explain(ERROR, document=False)
    lines = capsys.readouterr().err.splitlines()
    assert max(map(len, lines)) <= 40
    assert lines[0].startswith("ipsecgate: not covered after 5 s: why")
    assert all(line.startswith("  ") for line in lines[1:])
    (place,) = (place for place, line in enumerate(lines) if line.startswith("  next: do"))
    assert lines[place + 1].startswith("        do")


def test_an_error_in_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    explain(ERROR, document=False)
    assert len(capsys.readouterr().err.splitlines()) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["statsu"], "did you mean `ipsecgate status`"),
        (["event"], "did you mean `ipsecgate events`"),
        (["zzzz"], "next: `ipsecgate --help`"),
        (["why", "--form", "10.1.0.1"], "`ipsecgate why --help`"),
        (["status", "--json"], "`ipsecgate --json status`"),
        (["why", "-c", "x"], "`ipsecgate -c FILE why`"),
        (["attach"], "`ipsecgate attach --help`"),
    ],
)
def test_a_slip_on_the_command_line_names_the_next_step(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == UsageError.exit_code
    assert said in capsys.readouterr().err


def test_the_help_begins_with_what_one_needs_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    screen = capsys.readouterr().out
    parts = [*GROUPS, "Options", "Examples", "Environment"]
    places = [screen.index(f"\n{part}:\n") for part in parts]
    assert places == sorted(places)
    assert list(Verbs.verbs)[:2] == ["status", "why"]
    assert sum(map(len, GROUPS.values())) == len(Verbs.verbs), "each verb is in one group"
