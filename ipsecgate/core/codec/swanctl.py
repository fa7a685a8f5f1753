"""The proposals of the connections in swanctl.conf, which VICI does not tell.

    connections {
      NAME {
        proposals = aes256-sha256-x25519, default
      }
    }

Rules of this module: what is not of this form is skipped. It reads nothing else, and inherits
nothing from other sections (`NAME : OTHER {`).

Source: strongswan.conf(5).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_TOKEN = re.compile(
    r"""
      \#[^\n]*                                                 # a comment
    | (?P<close>\})
    | (?P<open>[^\s{}=\#:,"]+) [^\S\n]* (?: : [^{}\n=]* )? \s* \{
    | (?P<key>[^\s{}=\#:]+) [^\S\n]* = [^\S\n]* (?: "(?P<quoted>[^"]*)" | (?P<plain>[^\n\#}]*) )
    """,
    re.VERBOSE,
)


def proposals(text: str) -> dict[str, tuple[str, ...]]:
    """Return the IKE proposals by connection, for those that have any."""
    return {
        path[1]: tuple(one.strip() for one in value.split(",") if one.strip())
        for path, key, value in _values(text)
        if path[:1] == ("connections",) and len(path) == 2 and key == "proposals"
    }


def _values(text: str) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Yield each value with the sections around it, and its key."""
    path: list[str] = []
    for token in _TOKEN.finditer(text):
        if token["close"]:
            del path[-1:]
        elif token["open"]:
            path.append(token["open"])
        elif token["key"]:
            value = token["quoted"] if token["quoted"] is not None else token["plain"]
            yield tuple(path), token["key"], value.strip()
