"""Text from outside reaches terminals and logs without control characters, markup or new lines."""

from __future__ import annotations

import io
import json
import logging
import socket
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipsecgate.admin.status_document import Status
from ipsecgate.cli import app, event_lines, messages
from ipsecgate.core.check.finding import Finding, State
from ipsecgate.edges.host import systemd
from ipsecgate.errors import GateError
from ipsecgate.printable import printable, printable_document, printable_lines

EVIL = "[/x][red]a[/red] :x: \x1b]0;owned\x07\x1b[8m\r\x7f\nERROR: forged\u202egnp\u200b\x9b1m"
SHOWN = r"[/x][red]a[/red] :x: \x1b]0;owned\x07\x1b[8m\r\x7f\nERROR: forged\u202egnp\u200b\x9b1m"


def is_clean(text: str) -> bool:
    """Return whether the text consists of lines of visible characters only."""
    return all(
        character in "\n " or unicodedata.category(character)[0] not in "CZ" for character in text
    )


def drawn(what: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what our console prints to a file, without folding lines."""
    monkeypatch.setenv("COLUMNS", "2000")
    console = messages.console()
    console.file = io.StringIO()
    console.print(what)
    return console.file.getvalue()


@given(st.text())
def test_any_text_becomes_one_clean_line(text: str) -> None:
    shown = printable(text)
    assert is_clean(shown)
    assert "\n" not in shown
    assert is_clean(printable_lines(text))


@given(st.text(st.characters(categories=["L", "M", "N", "P", "S"], include_characters=" ")))
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


def test_a_document_is_cleaned_including_its_keys() -> None:
    document = {"a\x1b": ["\x1b", {"b": ("\n", 1, None, True)}]}
    assert printable_document(document) == {r"a\x1b": [r"\x1b", {"b": [r"\n", 1, None, True]}]}


def evil_status() -> Status:
    """Return a status document full of hostile text, and with an IPv6 flow."""
    return {
        "instance": EVIL,
        "mode": "enforce",
        "default": "allow",
        "sa_source": EVIL,
        "published": True,
        "controller": {"alive": True, "ready": True, "pid": 1, "since": 0},
        "healthy": False,
        "problems": [{"text": EVIL, "advice": EVIL}],
        "errors": [{"text": EVIL, "advice": EVIL}],
        "warnings": [{"text": EVIL, "advice": EVIL}],
        "hooks": [{"cgroup": EVIL, "cgroup_id": 1, "hook": EVIL, "attached": True, "prog_id": 1}],
        "policies": [
            {
                "name": EVIL,
                "action": "protect",
                "uncovered": [EVIL],
                "children": [EVIL],
                "remote": [EVIL],
                "protocol": EVIL,
                "port": EVIL,
                "local_port": EVIL,
                "child": EVIL,
                "initiate": "start",
                "derived": False,
                "source": EVIL,
                "coverage": EVIL,
                "last_error": EVIL,
                "advice": EVIL,
                "failed_at": 0.0,
            }
        ],
        "negotiated": [{"policy": EVIL, "outcome": EVIL, "count": 1}],
        "refused_by_policy": [
            {
                "policy": EVIL,
                "cgroup_id": 1,
                "comm": EVIL,
                "flow": EVIL,
                "time": 0.0,
                "refused": 1,
                "blocked": 1,
            }
        ],
        "refused_by_cgroup": [
            {
                "policy": EVIL,
                "cgroup_id": 1,
                "comm": EVIL,
                "flow": EVIL,
                "time": 0.0,
                "refused": 1,
                "blocked": 1,
            }
        ],
        "negotiations": [
            {
                "child": EVIL,
                "state": EVIL,
                "attempts": 1,
                "flow": "tcp [2001:db8::9]:5432",
                "last_error": EVIL,
                "advice": EVIL,
                "failed_at": 0.0,
                "policy": EVIL,
            }
        ],
        "sas": [
            {
                "spi": EVIL,
                "protocol": EVIL,
                "peer": EVIL,
                "reqid": 1,
                "child": EVIL,
                "since": None,
                "until": None,
            }
        ],
        "holds": [
            {
                "pid": 1,
                "comm": EVIL,
                "flow": EVIL,
                "daddr": EVIL,
                "proto": 6,
                "dport": 1,
                "since": 0.0,
                "limit": 1.0,
                "child": EVIL,
                "policy": EVIL,
            }
        ],
        "refused": [
            {
                "flow": "tcp [2001:db8::9]:5432",
                "source": EVIL,
                "reason": EVIL,
                "text": EVIL,
                "cause": EVIL,
                "advice": EVIL,
                "failed_at": 0.0,
                "child": EVIL,
                "policy": EVIL,
                "last": 0.0,
                "state": EVIL,
            }
        ],
        "namespaces": [{"pid": 1, "instance": EVIL, "outside": [EVIL]}],
        "time_to_covered": [{"policy": EVIL, "buckets": [[0.01, 1]], "sum": 0.0, "count": 1}],
        "drift": {"kernel": 0, "maps": 0},
        "counters": {
            "allowed": 0,
            "held": 0,
            "refused": 0,
            "audited": 0,
            "leaked_blocked": 0,
            "leaked_audited": 0,
            "events_lost": 0,
            "reasons": {f"refuse_{EVIL}": 1},
        },
        "hook_tables": {
            "policy_masks": 1,
            "policy_entries": 1,
            "spd_masks": 0,
            "spd_entries": 0,
            "memory": 1 << 20,
        },
    }


@pytest.mark.parametrize(
    ("words", "times"),
    [
        (("status",), 8),
        (("status", "--brief"), 2),
        (("policies",), 6),
        (("sas",), 3),
        (("holds",), 3),
    ],
)
def test_a_screen_of_the_status_is_clean(
    words: tuple[str, ...], times: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A hostile identity neither breaks the rendering nor loses its brackets."""
    monkeypatch.setenv("COLUMNS", "2000")
    for place in ("ipsecgate.cli.status", "ipsecgate.admin.status"):
        monkeypatch.setattr(f"{place}.status_of", lambda *_args: evil_status())
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit):
        app.main(["--cache-dir", str(tmp_path), *words])
    said = out.getvalue()
    assert is_clean(said)
    assert said.count(SHOWN) >= times
    assert words != ("status",) or "tcp [2001:db8::9]:5432" in said


@pytest.mark.parametrize("kind", ["refused", "log", "covered"])
def test_an_event_is_one_clean_line(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = ("text", "comm", "policy", "origin", "cgroup", "unit", "container", "child", "cause")
    record = {
        **dict.fromkeys(evil, EVIL),
        "seq": 1,
        "time": 0.0,
        "kind": kind,
        "flow": "tcp [2001:db8::9]:5432",
        "scope": "flow",
        "pid": 1,
        "audited": False,
        "count": 1,
        "spi": None,
        "covered_after": 0.1,
    }
    said = drawn(event_lines.drawn(record, None), monkeypatch)
    assert is_clean(said)
    assert said.count("\n") == 1
    assert SHOWN in said
    assert kind == "log" or "tcp [2001:db8::9]:5432" in said


def test_the_check_screen_is_clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "2000")
    finding = Finding(EVIL, State.MISSING, EVIL, EVIL, 1)
    monkeypatch.setattr("ipsecgate.cli.check.examine", lambda *_args: [finding])
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit):
        app.main(["--cache-dir", str(tmp_path), "check"])
    assert is_clean(out.getvalue())
    assert "[/x][red]a[/red] :x: \\x1b]0;owned" in out.getvalue()


def test_an_error_cannot_forge_lines_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "2000")
    messages.explain(GateError(EVIL, hint=EVIL, evidence=EVIL), document=False)
    lines = capsys.readouterr().err.splitlines()
    assert is_clean("\n".join(lines))
    assert [line for line in lines if not line.startswith(("ipsecgate: ", "  "))] == []
    messages.explain(GateError(EVIL, hint=EVIL, evidence=EVIL), document=True)
    said = capsys.readouterr().err
    assert is_clean(said)
    assert json.loads(said) == {"error": EVIL, "hint": EVIL, "evidence": EVIL}


def test_a_log_record_is_one_line_and_a_traceback_is_indented() -> None:
    formatter = app._OneLine("%(levelname)s: %(message)s")
    record = logging.LogRecord("ipsecgate", logging.INFO, "", 0, "gated: %s", (EVIL,), None)
    assert formatter.format(record) == f"INFO: gated: {SHOWN}"
    try:
        raise ValueError(EVIL)
    except ValueError:
        record.exc_info = sys.exc_info()
    first, *more = formatter.format(record).split("\n")
    assert first == f"INFO: gated: {SHOWN}"
    assert is_clean("".join(more))
    assert all(line.startswith(("  ", "Traceback")) for line in more)


def test_a_traceback_is_printed_without_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        raise ValueError(EVIL)
    except ValueError as error:
        app._print_defect(type(error), error, error.__traceback__)
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert is_clean(said)
    assert "\nERROR: forged" not in said


def test_a_status_cannot_smuggle_a_field_to_the_service_manager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        systemd.notify(STATUS="peer x\nREADY=1")
        assert sock.recv(4096) == b"STATUS=peer x\\nREADY=1"


def test_no_verb_prints_text_that_is_not_cleaned() -> None:
    """Documents go through `as_json`, which escapes; no verb may echo plain text."""
    folder = Path(app.__file__).parent
    lines = [line for path in folder.glob("*.py") for line in path.read_text().splitlines()]
    echoes = [line for line in lines if "click.echo(" in line]
    assert echoes
    assert [line for line in echoes if "as_json(" not in line] == []
