"""Log messages with structured fields, to systemd's journal: `journalctl IPSECGATE_POLICY=db`.

One datagram for each message: NAME=value lines; a value with line breaks is preceded by its length
instead. The attribute `fields` of a log record becomes the fields IPSECGATE_*.

Rules of this module: it never waits. A message for which the journal has no room is counted, and
the count is logged with the next one.

Source: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/; JOURNAL_STREAM in systemd.exec(5).
"""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

from ipsecgate.printable import printable, printable_lines

SOCKET = Path("/run/systemd/journal/socket")
STDERR = 2
LONGEST = 16 << 10  # characters of a value; a datagram has room for some 200 KiB
# Source: syslog(3).
PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}


def is_journal() -> bool:
    """Return whether what this process writes to stderr goes to the journal."""
    try:
        stderr = os.fstat(STDERR)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}"


class NativeJournal(logging.Handler):
    """Sends log records to the journal, each with the instance's name."""

    def __init__(self, instance: str, path: Path = SOCKET) -> None:
        """Raises: OSError."""
        super().__init__()
        self._always = {"SYSLOG_IDENTIFIER": "ipsecgate", "IPSECGATE_INSTANCE": instance}
        self._path = os.fspath(path)
        self._lost = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record."""
        fields: dict[str, str] = getattr(record, "fields", {})
        ours = {f"IPSECGATE_{name.upper()}": value for name, value in fields.items()}
        priority = PRIORITIES.get(record.levelno, PRIORITIES[logging.ERROR])
        if self._lost and self._send(f"{self._lost} log messages were lost", 4, {}):
            self._lost = 0
        if self._lost or not self._send(printable_lines(self.format(record)), priority, ours):
            self._lost += 1

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
        super().close()

    def _send(self, message: str, priority: int, fields: dict[str, str]) -> bool:
        shown = {name: printable(value) for name, value in fields.items()}
        head = {"MESSAGE": message, "PRIORITY": str(priority)}
        try:
            self._socket.sendto(datagram({**head, **self._always, **shown}), self._path)
        except OSError:
            return False
        return True


def datagram(fields: dict[str, str]) -> bytes:
    """Return a message of the native protocol."""
    lines = []
    for name, text in fields.items():
        value = text[:LONGEST].encode(errors="backslashreplace")
        if b"\n" in value:
            lines.append(name.encode() + b"\n" + len(value).to_bytes(8, "little") + value + b"\n")
        else:
            lines.append(name.encode() + b"=" + value + b"\n")
    return b"".join(lines)
