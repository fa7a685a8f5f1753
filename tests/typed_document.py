"""Compare a parsed JSON document with the TypedDict that declares it."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints, is_typeddict


def mismatches(value: Any, declared: Any, where: str = "document") -> list[str]:
    """Return one line for each missing, undeclared or wrongly typed value; [] if all match."""
    if is_typeddict(declared):
        return _fields(value, get_type_hints(declared), where)
    match get_origin(declared):
        case origin if origin is list and isinstance(value, list):
            (item,) = get_args(declared)
            return [
                found
                for number, each in enumerate(value)
                for found in mismatches(each, item, f"{where}[{number}]")
            ]
        case origin if origin is dict and isinstance(value, dict):
            _, item = get_args(declared)
            return [
                found
                for key, each in value.items()
                for found in mismatches(each, item, f"{where}.{key}")
            ]
        case origin if origin is UnionType:
            fits = any(not mismatches(value, option) for option in get_args(declared))
        case origin if origin is Literal:
            fits = value in get_args(declared)
        case _:
            # JSON has one kind of number, and in Python a bool is an int.
            kinds = {float: (float, int), None: (NoneType,)}.get(declared, (declared,))
            fits = type(value) in kinds
    return [] if fits else [f"{where}: {value!r} is not {declared}"]


def _fields(value: Any, hints: dict[str, Any], where: str) -> list[str]:
    if not isinstance(value, dict):
        return [f"{where}: {value!r} is not an object"]
    return [
        *(f"{where}.{name}: missing" for name in hints.keys() - value.keys()),
        *(f"{where}.{name}: not declared" for name in value.keys() - hints.keys()),
        *(
            found
            for name in hints.keys() & value.keys()
            for found in mismatches(value[name], hints[name], f"{where}.{name}")
        ),
    ]
