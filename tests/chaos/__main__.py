"""`make chaos` in the test kernel: faults, then restarts under constant load, then rekeys.

CHAOS_SEED repeats a run; CHAOS_FAULTS, CHAOS_ATTEMPTS, CHAOS_TURNS and CHAOS_REKEYS set the size.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.chaos.build_world import build_world
from tests.chaos.restarts import hammer_gate
from tests.chaos.run import chosen_seed, run
from tests.chaos.soak import soak
from tests.chaos.world import World


def number(name: str, otherwise: int) -> int:
    return int(os.environ.get(f"CHAOS_{name}") or otherwise)


def faults(made: World, seed: int) -> None:
    run(made, seed, number("FAULTS", 1000), sys.stdout)


def hammer(made: World, seed: int) -> None:
    attempts, turns = number("ATTEMPTS", 200_000), number("TURNS", 60)
    result = hammer_gate(made, random.Random(seed), attempts, turns)
    sys.stdout.write(f"\nhammered: {result.figures()}\n")
    result.check(attempts, turns)


def rekeys(made: World, seed: int) -> None:
    soak(made, random.Random(seed), number("REKEYS", 2000), sys.stdout)


def main() -> int:
    argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__).parse_args()
    seed = chosen_seed()
    failed = False
    for proof in (faults, hammer, rekeys):
        if not number(proof.__name__.upper(), 1):
            continue
        with tempfile.TemporaryDirectory() as cache, build_world(Path(cache)) as made:
            failed = not holds(proof, made, seed) or failed
    return int(failed)


def holds(proof: Callable[[World, int], None], made: World, seed: int) -> bool:
    try:
        proof(made, seed)
    except AssertionError as error:
        sys.stdout.write(f"{proof.__name__}: {type(error).__name__}: {error}\n")
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
