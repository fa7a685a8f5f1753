"""Lines of text for people: results on stdout, errors on stderr.

Rules of this module: a terminal gets lines that break between words, indented after the first; a
pipe gets one line for each, for grep and the like. Nothing is cut off: a word that is wider than
the terminal, such as a path, stays whole.
"""

from __future__ import annotations

import os
from textwrap import wrap
from typing import TYPE_CHECKING

import click

from ipsecgate.errors import GateError
from ipsecgate.printable import as_json, printable, printable_lines

if TYPE_CHECKING:
    from rich.console import Console

INDENT = "  "
NEXT = "next: "


def console(*, stderr: bool = False) -> Console:
    """Return a console on stdout or stderr."""
    # Imported late: `run` should not keep it in memory, and `exec` must start quickly.
    from rich.console import Console  # noqa: PLC0415

    # No markup and no :emoji: codes: screens show text from outside, which may contain both.
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def width_of(out: Console) -> int | None:
    """Return the columns to fit in; None: a line is as long as what it says."""
    return out.width if out.is_terminal or os.environ.get("COLUMNS") else None


def wrapped(line: str, width: int | None, indent: str = INDENT) -> str:
    """Return a line, broken between words where it is wider than `width`.

    `indent`: of the lines after the first, in addition to the first one's own.
    """
    if width is None or len(line) <= width:
        return line
    margin = line[: len(line) - len(line.lstrip())]
    return "\n".join(
        wrap(
            line,
            width,
            subsequent_indent=margin + indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    )


def explain(error: GateError, *, document: bool) -> None:
    """Print an error on stderr: what is wrong, the evidence, and what to do next."""
    if document:
        data = {"error": str(error), "hint": error.hint}
        if error.evidence:
            data["evidence"] = error.evidence
        click.echo(as_json(data), err=True)
        return
    out = console(stderr=True)
    width = width_of(out)

    def show(text: str, style: str = "", indent: str = INDENT) -> None:
        lines = [wrapped(line, width, indent) for line in text.split("\n")]
        out.print("\n".join(lines), style=style or None, soft_wrap=True)

    name = "ipsecgate: "
    first, *more = str(error).split("\n")
    text = wrapped(name + printable(first), width)
    out.print(name, style="bold red", end="")
    out.print(text.removeprefix(name), soft_wrap=True)
    for line in more:
        show(INDENT + printable(line))
    for line in error.evidence.splitlines():
        show(INDENT + printable(line))
    if error.hint:
        show(f"{INDENT}{NEXT}{printable_lines(error.hint)}", "yellow", " " * len(NEXT))
