"""Make a JSON schema of a TypedDict, so that the two cannot drift apart.

Descriptions are the class's docstring and the comments behind its fields, which say units and what
None means. Fields may be added to a document later, so additional ones are allowed.

Source: JSON Schema, draft 2020-12.
"""

from __future__ import annotations

import ast
import inspect
import io
import sys
import tokenize
from types import NoneType, UnionType
from typing import (
    Any,
    Literal,
    NotRequired,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SIMPLE = {str: "string", bool: "boolean", int: "integer", float: "number", NoneType: "null"}

Schema = dict[str, Any]


def schema_of(declared: Any, title: str) -> Schema:
    """Return the schema of a declared type. Raises: TypeError for a type that it does not know."""
    definitions: dict[str, Schema] = {}
    top = _schema(declared, definitions)
    return {"$schema": DIALECT, "title": f"ipsecgate {title}", **top, "$defs": definitions}


def _schema(declared: Any, definitions: dict[str, Schema]) -> Schema:
    if is_typeddict(declared):
        if declared.__name__ not in definitions:
            definitions[declared.__name__] = {}  # it may contain itself
            definitions[declared.__name__] = _object(declared, definitions)
        return {"$ref": f"#/$defs/{declared.__name__}"}
    arguments = get_args(declared)
    match get_origin(declared):
        case origin if origin is list:
            return {"type": "array", "items": _schema(arguments[0], definitions)}
        case origin if origin is dict:
            return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
        case origin if origin in (UnionType, Union):
            return {"anyOf": [_schema(option, definitions) for option in arguments]}
        case origin if origin is Literal:
            return {"enum": list(arguments)}
        case origin if origin is NotRequired:
            return _schema(arguments[0], definitions)
    if declared in _SIMPLE:
        return {"type": _SIMPLE[declared]}
    raise TypeError(f"no schema for {declared!r}")


def _object(declared: Any, definitions: dict[str, Schema]) -> Schema:
    hints = get_type_hints(declared, include_extras=True)
    comments = _comments(declared)
    properties = {}
    for name, hint in hints.items():
        properties[name] = _schema(hint, definitions)
        if name in comments:
            properties[name]["description"] = comments[name]
    return {
        "type": "object",
        "description": inspect.cleandoc(declared.__doc__ or ""),
        "properties": properties,
        "required": [name for name in hints if get_origin(hints[name]) is not NotRequired],
    }


def _comments(declared: Any) -> dict[str, str]:
    """Return the comments behind the fields of a class and of those that it extends."""
    source = inspect.getsource(declared)
    lines = source.splitlines()
    found: dict[str, str] = {}
    for base in ast.parse(source).body[0].bases:  # type: ignore[attr-defined]
        # Python 3.11 leaves no trace of them in the class.
        parent = getattr(sys.modules[declared.__module__], getattr(base, "id", ""), None)
        found |= _comments(parent) if is_typeddict(parent) else {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            name = lines[token.start[0] - 1].partition(":")[0].strip()
            found[name] = token.string.lstrip("# ")
    return found
