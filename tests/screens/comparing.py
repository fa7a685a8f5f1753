"""Compare what two runs show: times, pids, counts, SPIs, versions and spacing may differ."""

from __future__ import annotations

import re
from collections.abc import Iterable

# What differs from run to run -> its placeholder; in this order.
VARYING = (
    (r"\d{4}-\d\d-\d\d[ T]", ""),
    (r"\d\d:\d\d:\d\d(?:\.\d+)?(?:[+-]\d\d:\d\d)?", "TIME"),
    (r"Linux \S+", "Linux N"),
    (r"(next: `ipsecgate why )[^`]+", r"\1FLOW"),  # the last refusal
    (r"\b(?=[0-9a-f]*\d)[0-9a-f]{8}\b", "SPI"),
    # A number that is no part of an address, a port, a name, or a line of a file.
    (r"(?<![\w.:/-])\d+(?:\.\d+){0,2}(?![\w:/-]|\.\d)", "N"),
    (r"\b(?:N|less than N) (?:ms|s|min|h)\b", "N s"),
    (r"\bN (\w+?)s?\b(?! ago)", r"N \1"),
    (r"\s+", " "),
)


def normal(line: str) -> str:
    """Return a line with placeholders for what differs from run to run."""
    for pattern, placeholder in VARYING:
        line = re.sub(pattern, placeholder, line)
    return line.strip()


def normalised(lines: Iterable[str]) -> list[str]:
    """Return the lines in that form, without empty ones."""
    return [line for line in map(normal, lines) if line]
