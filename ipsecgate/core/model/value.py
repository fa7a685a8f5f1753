"""The decorator for plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def value(cls: type[T]) -> type[T]:
    """Make a dataclass whose instances are compared and hashed by content, and never changed.

    mypy sees to the latter. With `frozen` Python would, but then an instance takes three times as
    long to make, and so does the class; a hub has a million instances.
    """
    own_hash = "__hash__" in vars(cls)
    return dataclass(slots=True, unsafe_hash=not own_hash)(cls)
