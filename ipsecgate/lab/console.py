"""A guest's streams as text: passed on line by line, and their ends for errors."""

from __future__ import annotations

import codecs
from collections.abc import Callable

PANIC = "Kernel panic - not syncing"
LINES = 20
"""Lines of the console that an error shows."""

OnOutput = Callable[[str], object]


def ignore(_text: str) -> None:
    """Take no notice: the `on_output` of those who want none."""


class Output:
    """Bytes to text: kept whole, and passed on line by line."""

    def __init__(self, on_output: OnOutput) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._on_output = on_output
        self._pending = ""
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """Everything so far."""
        return "".join(self._parts)

    def feed(self, data: bytes) -> None:
        """Take what was read; no bytes: the stream's end. Passes whole lines on."""
        text = self._decoder.decode(data, final=not data)
        self._parts.append(text)
        whole, newline, rest = (self._pending + text).rpartition("\n")
        self._pending = rest
        if newline:
            for line in whole.split("\n"):
                self._on_output(line + "\n")

    def flush(self) -> None:
        """Pass an unfinished line on."""
        if self._pending:
            pending, self._pending = self._pending, ""
            self._on_output(pending)


def last_lines(name: str, text: str) -> str:
    """Return the console's last `LINES` lines under a heading, or that it said nothing.

    A panic's line is the last: the stack below it would push out what led there.
    """
    before, panic, after = text.partition(PANIC)
    end = before + panic + after.partition("\n")[0]
    lines = [line.rstrip() for line in end.splitlines() if line.strip()][-LINES:]
    if not lines:
        return f"{name} wrote nothing to its console"
    heading = f"{name}, the last {len(lines)} lines of its console:"
    return "\n".join([heading, *(f"  {line}" for line in lines)])
