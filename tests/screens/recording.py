"""Run a command in a terminal and record what it writes, byte by byte, and what is then shown.

`record` is the real terminal: a pty of the given size. `shown` is what the user sees in the end:
pyte interprets the bytes, so screens that move the cursor or redraw themselves come out right.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import tempfile
import termios
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import pyte
from pyte.screens import Char
from rich.color import Color
from rich.style import Style
from rich.text import Text

ROWS = 24
LINES = 400  # of the screen that `shown` draws: longer than any output
LIMIT = 120.0  # seconds


@dataclass(frozen=True, slots=True)
class Recorded:
    """One command in a terminal of `columns`; `output` has the terminal's escape sequences."""

    name: str
    argv: tuple[str, ...]
    columns: int
    exit_code: int
    output: str


def record(
    argv: Sequence[str], columns: int, env: Mapping[str, str], seconds: float | None = None
) -> tuple[int, bytes]:
    """Run `argv` in a terminal; return its exit code and what it wrote.

    It runs in the folder for temporary files. `seconds`: what it shows after that time is recorded,
    and then Ctrl-C is pressed; None: it ends by itself. Raises: TimeoutError.
    """
    master, slave = pty.openpty()
    try:
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
        process = subprocess.Popen(
            argv,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, **env},
            cwd=tempfile.gettempdir(),
            start_new_session=True,
        )
        os.close(slave)
        output, complete = _read(master, LIMIT if seconds is None else seconds)
        if not complete and seconds is None:
            process.kill()
            raise TimeoutError(f"{' '.join(argv)} does not end: {output[-500:]!r}")
        if not complete:
            process.send_signal(signal.SIGINT)
            _read(master, LIMIT)
        return process.wait(), output
    finally:
        os.close(master)


def _read(master: int, seconds: float) -> tuple[bytes, bool]:
    """Read until the terminal is closed (True) or the time is over (False)."""
    deadline, output = time.monotonic() + seconds, b""
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([master], [], [], left)[0]:
            break
        data = b""
        with contextlib.suppress(OSError):  # EIO: nobody has the terminal open any more
            data = os.read(master, 65536)
        if not data:
            return output, True
        output += data
    return output, False


class _Screen(pyte.Screen):
    """A screen that knows faint text, which pyte does not: blinking takes its place."""

    def select_graphic_rendition(self, *attrs: int, **kwargs: bool) -> None:
        super().select_graphic_rendition(*attrs, **kwargs)
        if 2 in attrs and not {38, 48} & set(attrs):
            self.cursor.attrs = self.cursor.attrs._replace(blink=True)
        elif 22 in attrs:
            self.cursor.attrs = self.cursor.attrs._replace(blink=False)


def shown(output: str, columns: int) -> Text:
    """Return what a terminal of `columns` shows after `output`, without empty lines at the end."""
    screen = _Screen(columns, LINES)
    pyte.Stream(screen).feed(output)
    lines = []
    for number in range(LINES):
        row = screen.buffer[number]
        line = Text(end="")
        for style, cells in groupby(map(row.__getitem__, range(columns)), _style):
            # Spaces are apart, so each column of a table becomes an element of its own.
            for part in re.split("( {2,}|^ | $)", "".join(cell.data for cell in cells)):
                line.append(part, style)
        line.rstrip()
        lines.append(line)
    while lines and not lines[-1].plain:
        lines.pop()
    return Text("\n").join(lines)


def _style(char: Char) -> Style:
    return Style(
        color=_colour(char.fg),
        bgcolor=_colour(char.bg),
        bold=char.bold,
        italic=char.italics,
        underline=char.underscore,
        reverse=char.reverse,
        dim=char.blink,
    )


def _colour(name: str) -> Color | None:
    if name == "default":
        return None
    if len(name) == 6 and all(letter in "0123456789abcdef" for letter in name):
        return Color.parse(f"#{name}")
    name = name.replace("brown", "yellow")
    return Color.parse(f"bright_{name[6:]}" if name.startswith("bright") else name)
