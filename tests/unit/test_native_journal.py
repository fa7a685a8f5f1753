"""Log messages as datagrams of systemd's native journal protocol."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ipsecgate.edges.host import native_journal
from ipsecgate.edges.host.native_journal import NativeJournal, datagram


def parsed(message: bytes) -> dict[str, str]:
    """Return the fields of a datagram, read as the protocol's documentation says."""
    fields = {}
    while message:
        line, _, rest = message.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(rest[:8], "little")
            value, rest = rest[8 : 8 + size], rest[8 + size :]
            assert rest[:1] == b"\n"
            rest = rest[1:]
        fields[name.decode()] = value.decode()
        message = rest
    return fields


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(os.fspath(tmp_path / "socket"))
        sock.settimeout(5)
        yield sock


@pytest.fixture
def logger(journald: socket.socket, tmp_path: Path) -> Iterator[logging.Logger]:
    logger = logging.Logger("test")
    handler = NativeJournal("east", tmp_path / "socket")
    logger.addHandler(handler)
    yield logger
    handler.close()


def test_a_message_carries_its_fields(logger: logging.Logger, journald: socket.socket) -> None:
    extra = {"fields": {"policy": "db", "covered_after": "0.087"}}
    logger.warning("refused %s", "tcp 10.2.0.9:5432", extra=extra)
    assert parsed(journald.recv(1 << 16)) == {
        "MESSAGE": "refused tcp 10.2.0.9:5432",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "ipsecgate",
        "IPSECGATE_INSTANCE": "east",
        "IPSECGATE_POLICY": "db",
        "IPSECGATE_COVERED_AFTER": "0.087",
    }


def test_text_from_outside_forges_no_field(logger: logging.Logger, journald: socket.socket) -> None:
    evil = "x\nPRIORITY=0\n\x1b[2J"
    try:
        raise ValueError(evil)
    except ValueError:
        logger.exception("%s", evil, extra={"fields": {"comm": evil}})
    fields = parsed(journald.recv(1 << 16))
    assert fields["PRIORITY"] == "3"
    assert fields["IPSECGATE_COMM"] == r"x\nPRIORITY=0\n\x1b[2J"
    lines = fields["MESSAGE"].split("\n")
    assert lines[0] == "x"
    assert all(line.startswith("  ") for line in lines[1:])
    assert "\x1b" not in fields["MESSAGE"]


def test_lone_surrogates_and_long_values_are_sent() -> None:
    fields = parsed(datagram({"A": "\udc80", "B": "y" * 100_000}))
    assert fields == {"A": r"\udc80", "B": "y" * native_journal.LONGEST}


def test_a_full_journal_delays_nothing_and_what_is_lost_is_counted(
    logger: logging.Logger, journald: socket.socket
) -> None:
    count = 10_000
    for number in range(count):
        logger.info("%d", number)
    journald.setblocking(False)
    received = 0
    with suppress(BlockingIOError):
        while journald.recv(1 << 16):
            received += 1
    assert 0 < received < count, "all of them fit: this test proves nothing"
    logger.info("after")
    lost, after = (parsed(journald.recv(1 << 16)) for _ in range(2))
    assert lost["MESSAGE"] == f"{count - received} log messages were lost"
    assert after["MESSAGE"] == "after"


def test_a_journal_that_is_restarted_gets_the_next_message(
    logger: logging.Logger, journald: socket.socket, tmp_path: Path
) -> None:
    journald.close()
    logger.info("nobody listens")
    (tmp_path / "socket").unlink()
    logger.info("no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(os.fspath(tmp_path / "socket"))
        logger.info("hello")
        assert parsed(other.recv(1 << 16))["MESSAGE"] == "2 log messages were lost"
        assert parsed(other.recv(1 << 16))["MESSAGE"] == "hello"


def test_only_a_stderr_that_is_the_journal_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = os.fstat(2)
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    assert not native_journal.is_journal()
    monkeypatch.setenv("JOURNAL_STREAM", f"{stderr.st_dev}:{stderr.st_ino}")
    assert native_journal.is_journal()
    monkeypatch.setenv("JOURNAL_STREAM", f"{stderr.st_dev}:{stderr.st_ino + 1}")
    assert not native_journal.is_journal()
