"""Write man pages: lines of troff from plain text in which `backticks` mark what one types.

Source: man-pages(7), groff_man(7).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from textwrap import wrap

import click

from ipsecgate.cli.verb import Example


def title(name: str, section: int, book: str) -> str:
    """Return the page's first lines. Words are not hyphenated: a break would look typed.

    SOURCE_DATE_EPOCH is its date, as for every reproducible build.
    Source: reproducible-builds.org/specs/source-date-epoch.
    """
    when = time.gmtime(float(os.environ.get("SOURCE_DATE_EPOCH", time.time())))
    day = time.strftime("%Y-%m-%d", when)
    return f'.TH {name.upper()} {section} {day} "ipsecgate {version("ipsecgate")}" "{book}"\n.nh'


def text(plain: str) -> str:
    """Escape what troff would interpret, and print `quoted` words in bold; on one line."""
    escaped = plain.replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq")
    escaped = re.sub(r"`([^`]*)`", r"\\fB\1\\fR", escaped)
    return rf"\&{escaped}" if escaped.startswith((".", "'")) else escaped


def paragraphs(plain: str) -> Iterator[str]:
    """Yield the paragraphs of a text, in lines of at most 80 bytes; an empty line divides them."""
    for number, paragraph in enumerate(plain.strip().split("\n\n")):
        if number:
            yield ".PP"
        yield from _filled(paragraph)


def entry(term: str, *meanings: str) -> Iterator[str]:
    """Yield an entry of a list, with a paragraph for each meaning; `term` is troff."""
    yield from (".TP", term)
    for number, meaning in enumerate(meanings):
        yield from ((".IP",) if number else ())
        yield from _filled(meaning)


def _filled(plain: str) -> Iterator[str]:
    """Yield a text on several lines; a word in backticks is not broken."""
    words = re.sub(r"`[^`]*`", lambda quoted: quoted[0].replace(" ", "\0"), " ".join(plain.split()))
    for line in wrap(words, 64, break_long_words=False, break_on_hyphens=False):
        yield text(line.replace("\0", " "))


def verbatim(lines: Iterable[str]) -> Iterator[str]:
    """Yield lines that are printed as they are."""
    yield from (".RS 4", ".EX")
    yield from (text(line).replace("`", r"\(ga") for line in lines)
    yield from (".EE", ".RE")


def examples(command: click.Command) -> Iterator[str]:
    """Yield the examples of a verb, as its help shows them."""
    shown: tuple[Example, ...] = getattr(command, "examples", ())
    yield from verbatim([each for line, meaning in shown for each in (f"# {meaning}", line)])
