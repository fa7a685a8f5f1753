"""`ipsecgate events`: which records are shown, and how a receipt is drawn in 80 and 140 columns."""

from __future__ import annotations

from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from ipsecgate.cli import events
from ipsecgate.cli.app import App
from ipsecgate.cli.event_lines import drawn
from ipsecgate.cli.events import moment, wish
from ipsecgate.errors import NoControllerError, UsageError
from ipsecgate.paths import Paths

NOON = datetime(2031, 5, 4, 12, 0, 1, 234000).timestamp()
RECEIPT: dict[str, Any] = {
    "seq": 1,
    "time": NOON,
    "kind": "refused",
    "text": "no live SA protects it",
    "scope": "flow",
    "count": 5990,
    "last": NOON + 60,
    "flow": "tcp 10.2.0.9:5432",
    "policy": "db",
    "origin": "/etc/ipsecgate/policies.d/db.toml:12",
    "audited": False,
    "pid": 4711,
    "comm": "psql",
    "cgroup": "/sys/fs/cgroup/system.slice/postgresql.service",
    "unit": "postgresql.service",
    "container": None,
    "child": "peer/net",
    "cause": "AUTHENTICATION_FAILED: the peer rejects our identity or credentials",
    "spi": "c0ffee01",
    "reqid": 1,
    "covered_after": 0.087,
}
LOG = {"seq": 2, "time": NOON, "kind": "log", "text": "ready", "level": "info", "fields": {}}
AGAIN = {**RECEIPT, "kind": "again", "text": "again, 599 times in 60 s", "of": 1}


def test_a_receipt_fits_80_columns() -> None:
    assert drawn(RECEIPT, 80, NOON).plain.splitlines() == [
        "12:00:01.234  refused   tcp 10.2.0.9:5432  psql (4711) in postgresql.service",
        "                        no live SA protects it",
        "                        policy db (/etc/ipsecgate/policies.d/db.toml:12)",
        "                        peer/net: AUTHENTICATION_FAILED: the peer rejects our",
        "                        identity or credentials",
        "                        5,990 times, last 12:01:01.234",
        "                        covered after 87 ms by peer/net, SPI c0ffee01",
    ]


def test_a_receipt_uses_140_columns() -> None:
    lines = drawn(RECEIPT, 140, NOON).plain.splitlines()
    assert len(lines) == 4
    assert lines[0].endswith("psql (4711) in postgresql.service; no live SA protects it")
    assert max(map(len, lines)) > 100


@pytest.mark.parametrize("width", [80, 140, None])
def test_only_the_flow_is_bold(width: int | None) -> None:
    text = drawn(RECEIPT, width, NOON)
    assert not text.style
    bold = [text.plain[span.start : span.end] for span in text.spans if span.style == "bold"]
    assert bold == ["tcp 10.2.0.9:5432"]


def test_a_failure_that_a_receipt_names_is_not_told_twice() -> None:
    fields = {"event": "failed", "child": RECEIPT["child"], "cause": RECEIPT["cause"]}
    told = {**LOG, "fields": fields}
    other = {**LOG, "fields": {**fields, "cause": "another"}}
    assert events._once([RECEIPT, told, LOG, other]) == [RECEIPT, LOG, other]
    assert events._once([told, LOG]) == [told, LOG]


def test_a_pipe_gets_a_line_for_each_record() -> None:
    for record in (RECEIPT, LOG, AGAIN):
        assert "\n" not in drawn(record, None, NOON).plain


@pytest.mark.parametrize("width", range(30, 160, 7))
def test_nothing_is_wider_than_the_screen_and_nothing_is_left_out(width: int) -> None:
    long = {**RECEIPT, "container": "x" * 200, "flow": "tcp [2001:db8::1234:5678:9abc:def0]:65535"}
    text = drawn(long, width, NOON).plain
    assert max(map(len, text.splitlines())) <= max(width, 24 + 20)
    assert text.count("x") == 200
    assert "covered" in text


def test_another_day_is_named() -> None:
    assert drawn(LOG, 80, NOON + 86400).plain.startswith("May 04 12:00:01")


@pytest.mark.parametrize(
    ("text", "ago"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("2h", 7200), ("1d", 86400)]
)
def test_since_is_a_duration_or_a_time(text: str, ago: float) -> None:
    assert moment(text, NOON) == NOON - ago
    assert moment("2031-05-04T12:00:01.234", 0.0) == NOON
    assert moment("2031-05-04 12:00:01.234", 0.0) == NOON
    assert moment("2031-05-04T12:00Z", 0.0) == moment("2031-05-04T14:00+02:00", 0.0)


@pytest.mark.parametrize("text", ["", "10", "m", "-5m", "10 min", "yesterday", "\x1b[0m"])
def test_another_since_is_an_error(text: str) -> None:
    with pytest.raises(UsageError, match="neither a duration nor a time") as refused:
        moment(text, NOON)
    assert "10m" in refused.value.hint


def shown(record: dict[str, Any], **options: Any) -> bool:
    return wish(**{"denied": False, "since": 0.0, "unit": None, "policy": None, **options})(record)


def test_filters() -> None:
    log_of_policy = {**LOG, "fields": {"policy": "db", "child": "peer/net"}}
    contained = {**RECEIPT, "unit": "docker-1.scope", "container": "web"}
    assert shown(RECEIPT)
    assert shown(LOG)
    assert shown(RECEIPT, denied=True)
    assert not shown(LOG, denied=True)
    assert shown(AGAIN, denied=True), "a follower hears of its receipts"
    assert shown(RECEIPT, since=NOON + 60), "it was refused then"
    assert not shown(RECEIPT, since=NOON + 61)
    assert not shown(LOG, since=NOON + 1)
    for name in ("postgresql", "postgresql.service"):
        assert shown(RECEIPT, unit=name)
    for name in ("postgres", "postgresql.scope", ""):
        assert not shown(RECEIPT, unit=name)
    assert shown(contained, unit="web")
    assert not shown(LOG, unit="postgresql")
    assert shown(RECEIPT, policy="db")
    assert shown(log_of_policy, policy="db")
    assert not shown(RECEIPT, policy="d")
    assert not shown(LOG, policy="db")


def test_a_follower_misses_nothing_of_the_next_controller(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A fake control socket: two controllers, the second after a pause, with fewer events."""
    kept = {1: [1, 2, 3, 4], 2: [1, 2]}
    turns: list[int] = [1, 0, 0, 2, 2]  # which controller answers; 0: none

    def ask(_app: App, seq: int) -> dict[str, Any]:
        pid = turns.pop(0) if len(turns) > 1 else turns[0]
        if not pid:
            raise NoControllerError("no controller answers")
        found = [{"seq": one, "pid": pid} for one in kept[pid] if one > seq]
        return {"events": found, "pid": pid}

    monkeypatch.setattr(events, "_ask", ask)
    monkeypatch.setattr(events, "PERIOD", 0.0)
    app = App(Paths(Path("c"), "i", Path("b"), Path("r"), Path("k")), False, False, False)
    first = {"events": [{"seq": 1}, {"seq": 2}], "pid": 1}
    seen = [(one["pid"], one["seq"]) for one in islice(events._later(app, first), 4)]
    assert seen == [(1, 3), (1, 4), (2, 1), (2, 2)]
    assert caplog.messages == ["no controller answers; waiting for the next one"]
