"""The decorator for plain data."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def value(cls: type[T]) -> type[T]:
    """Make a dataclass whose instances are compared and hashed by content, and never changed.

    mypy sees to the latter. With `frozen` Python would, but then an instance takes three times as
    long to make, and so does the class; a hub has a million instances. All classes share one
    `__repr__`: to make one for each of two hundred classes would slow the start.
    """
    own = vars(cls).keys()
    if "__repr__" not in own:
        cls.__repr__ = _repr  # type: ignore[method-assign]
    return dataclass(slots=True, unsafe_hash="__hash__" not in own, repr=False)(cls)


def _repr(self: Any) -> str:
    shown = (f"{one.name}={getattr(self, one.name)!r}" for one in fields(self) if one.repr)
    return f"{type(self).__qualname__}({', '.join(shown)})"
