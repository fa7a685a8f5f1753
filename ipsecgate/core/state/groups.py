"""Values in groups, most of which have one member: by reqid, by region."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V", bound=Hashable)


class _Several(dict[V, None]):
    """The members of a group with more than one, in the order in which they came."""

    __slots__ = ()


class Groups(Generic[K, V]):
    """Sets of values by key. A set of one is the value itself: a hub has a hundred thousand.

    Adding a member again, and discarding one that is not there, change nothing.
    """

    def __init__(self) -> None:
        self._groups: dict[K, V | _Several[V]] = {}

    def __bool__(self) -> bool:
        return bool(self._groups)

    def keys(self) -> Collection[K]:
        """Return the keys of the groups, none of which is empty."""
        return self._groups.keys()

    def of(self, key: K) -> Collection[V]:
        """Return the members of a group."""
        found = self._groups.get(key)
        if found is None:
            return ()
        return found if isinstance(found, _Several) else (found,)

    def add(self, key: K, member: V) -> None:
        """Add a member to a group."""
        found = self._groups.setdefault(key, member)
        if isinstance(found, _Several):
            found[member] = None
        elif found is not member and found != member:
            self._groups[key] = _Several({found: None, member: None})

    def discard(self, key: K, member: V) -> None:
        """Remove a member from a group."""
        found = self._groups.get(key)
        if not isinstance(found, _Several):
            if found is not None and found == member:
                del self._groups[key]
            return
        found.pop(member, None)
        if len(found) == 1:
            self._groups[key] = next(iter(found))
