"""What repeats while nothing changes is told once, then counted.

    told, and its repetitions counted -- `WINDOW` seconds later --> their number is told, if any
                                                                    else it is forgotten

So a line that comes ten times a second becomes two lines a minute, and one that comes again after a
quiet minute is told in full.

Rules of this module: no count is lost, neither at the end nor when there are too many kinds to
remember; `due` yields it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

WINDOW = 60.0  # seconds
KINDS = 1024  # that are counted at a time

T = TypeVar("T")


@dataclass(slots=True)
class _Kind(Generic[T]):
    first: T
    since: float
    count: int = 0


class Repeats(Generic[T]):
    """The things told in the last `WINDOW` seconds, and how often each has come again."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._kinds: dict[Hashable, _Kind[T]] = {}  # the oldest first
        self._pushed_out: list[_Kind[T]] = []

    def seen(self, kind: Hashable) -> T | None:
        """Count one more of a kind; return the first one, None if there is none to count."""
        found = self._kinds.get(kind)
        if found is None:
            return None
        found.count += 1
        return found.first

    def add(self, kind: Hashable, first: T) -> None:
        """Remember the first of a kind, which is being told."""
        if len(self._kinds) >= KINDS:
            self._pushed_out.append(self._kinds.pop(next(iter(self._kinds))))
        self._kinds[kind] = _Kind(first, self._clock())

    def due(self, *, everything: bool = False) -> Iterator[tuple[T, int, float]]:
        """Yield the first one of each kind whose count is to be told, the count, and its seconds.

        `everything`: at the end, also those whose time has not come.
        """
        now = self._clock()
        gone, self._pushed_out = self._pushed_out, []
        for kind in gone:
            if kind.count:
                yield kind.first, kind.count, now - kind.since
        for key, kind in list(self._kinds.items()):
            if not everything and now - kind.since < WINDOW:
                continue
            del self._kinds[key]
            if kind.count:
                yield kind.first, kind.count, now - kind.since
                if not everything:
                    self._kinds[key] = _Kind(kind.first, now)


def again(count: int, seconds: float) -> str:
    """Return the words for a count."""
    return f"again, {count} times in {seconds:.0f} s"
