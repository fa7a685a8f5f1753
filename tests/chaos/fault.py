"""Faults as context managers: each strikes at the start of its block and is undone at the end.

`keeps`: everything covered stays covered, so not a single call may be refused. Some faults leave
processes dead or connections unloaded; `World.mend` acts as the service manager that restarts them,
and the gate must do the rest.
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
    """One kind of fault; `weight` is its relative frequency."""

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
    """Draw one fault, or two that strike at the same time."""
    count = 1 if rng.random() < 0.8 else 2
    chosen = rng.choices(FAULTS, [f.weight for f in FAULTS], k=count)
    return list(dict.fromkeys(chosen))
