"""swanctl.conf with the files that it includes, as one text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

CONFIGURATION = Path("/etc/swanctl/swanctl.conf")
ROOT = Path("/")  # an included path may be absolute, or relative to the file's folder
DEPTH = 10  # of files that include others, as strongSwan has it: MAX_INCLUSION_LEVEL

_INCLUDE = re.compile(r"\s*include\s+(\S+)")


def read_text(path: Path = CONFIGURATION) -> str:
    """Return the text; files that cannot be read are left out."""
    return "\n".join(_lines(path, DEPTH))


def _lines(path: Path, depth: int) -> Iterator[str]:
    text = ""
    with suppress(OSError):
        text = path.read_text(errors="replace")
    for line in text.splitlines():
        match = _INCLUDE.match(line)
        if match is None:
            yield line
        elif depth:
            for included in sorted(ROOT.glob(str(path.parent / match[1]).lstrip("/"))):
                yield from _lines(included, depth - 1)
