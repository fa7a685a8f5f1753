"""A guest's output as text: passed on line by line, and its last lines for error reports."""

from __future__ import annotations

import codecs
from collections.abc import Callable

PANIC = "Kernel panic - not syncing"
LINES = 20
"""How many console lines an error report shows."""

OnOutput = Callable[[str], object]


def ignore(_text: str) -> None:
    """Ignore output: an `on_output` that does nothing."""


class Output:
    """Decodes a byte stream as UTF-8, keeps all the text, and passes it on line by line."""

    def __init__(self, on_output: OnOutput) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._on_output = on_output
        self._pending = ""
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._parts)

    def feed(self, data: bytes) -> None:
        """Add bytes that were read (none: the end of the stream) and pass whole lines on."""
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
    """Return the last `LINES` lines of the console under a heading, or say that it is empty.

    A panic message counts as the last line: the stack trace below it would push out the cause.
    """
    before, panic, after = text.partition(PANIC)
    end = before + panic + after.partition("\n")[0]
    lines = [line.rstrip() for line in end.splitlines() if line.strip()][-LINES:]
    if not lines:
        return f"{name} wrote nothing to its console"
    heading = f"{name}, the last {len(lines)} lines of its console:"
    return "\n".join([heading, *(f"  {line}" for line in lines)])
