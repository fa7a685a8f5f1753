"""Make text from outside safe to print: process names, IKE identities, paths, error texts.

An escape sequence could move the cursor or hide text; a line break could forge a line of a log; a
bidirectional control could reorder a name. Each such character is printed as a Python escape, for
example \\x1b. JSON uses \\u escapes.

Source: Unicode general categories C (other) and Z (separator), UAX #44.
"""

from __future__ import annotations

import json
import unicodedata
from typing import Any

_MASKED = "CZ"


def printable(text: str) -> str:
    """Return `text` on one line, with every control, format or separator character escaped."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_shown, text))


def printable_lines(text: str) -> str:
    """Return `text` escaped but for its line breaks; later lines are indented by two blanks."""
    return "\n  ".join(map(printable, text.split("\n")))


def printable_document(value: Any) -> Any:
    """Return a copy of a document with all texts escaped, including keys."""
    match value:
        case str():
            return printable(value)
        case dict():
            return {printable(str(key)): printable_document(item) for key, item in value.items()}
        case list() | tuple():
            return [printable_document(item) for item in value]
    return value


def as_json(value: Any, *, indent: int | None = None) -> str:
    """Return a JSON document in printable ASCII. Parsing it gives the original texts."""
    return json.dumps(value, indent=indent).replace("\x7f", "\\u007f")


def _shown(character: str) -> str:
    if character == " " or unicodedata.category(character)[0] not in _MASKED:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
