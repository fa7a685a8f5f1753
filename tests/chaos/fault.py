"""What can go wrong, each as a block: it strikes at its beginning and is undone at its end.

`keeps`: what the kernel covers stays covered, so not one call may be refused. A fault leaves
processes dead or connections unloaded where that is its point; `World.mend` is the service manager
that starts them again, and the rest is up to the gate.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from tests.chaos.world import World

Strike = Callable[[World, random.Random], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of fault; `weight` is how often it is drawn, relative to the others."""

    name: str
    strike: Strike
    weight: int
    keeps: bool


FAULTS: list[Fault] = []


def fault(
    weight: int, *, keeps: bool = False
) -> Callable[[Callable[[World, random.Random], Iterator[None]]], Strike]:
    def register(body: Callable[[World, random.Random], Iterator[None]]) -> Strike:
        strike = contextmanager(body)
        FAULTS.append(Fault(body.__name__.replace("_", " "), strike, weight, keeps))
        return strike

    return register


def draw(rng: random.Random) -> list[Fault]:
    """Draw one fault, or a pair that strikes at once."""
    count = 1 if rng.random() < 0.8 else 2
    chosen = rng.choices(FAULTS, [f.weight for f in FAULTS], k=count)
    return list(dict.fromkeys(chosen))
