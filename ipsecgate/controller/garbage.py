"""When cyclic garbage is collected: often among what is new, and never among all that there is.

A hub has millions of objects, none of them in cycles, and a look at them all would take a second.
When much of what is new has survived, it is frozen (gc.freeze()): no later collection looks at it.
"""

from __future__ import annotations

import gc

NEW = 20_000  # objects made, less those that are gone, before the new ones are looked at: 1 ms
SURVIVED = 10  # such collections before what survived is frozen
NEVER = 1 << 30


class Garbage:
    """The settings of Python's collector. Call `freeze` between steps, `collect` now and then."""

    def __init__(self) -> None:
        # To collect what importing has left, 0.3 MiB, would take 10 ms of the start.
        gc.freeze()
        gc.set_threshold(NEW, NEVER, NEVER)
        gc.enable()

    def freeze(self) -> None:
        """Freeze what is there, if much of it is new."""
        if gc.get_count()[1] >= SURVIVED:
            gc.freeze()

    def collect(self) -> None:
        """Collect among everything that is not frozen."""
        gc.collect()
