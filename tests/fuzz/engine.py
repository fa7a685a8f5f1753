"""The rules that a decoder of outside bytes must keep for every input.

A real message must decode to its meaning. A damaged one must decode or be refused with an error
that the decoder documents. No input may change the target's state or take long. Anything else is a
finding. `tests.fuzz.run_target` makes the inputs.
"""

from __future__ import annotations

import sys
import time
import timeit
import traceback
from copy import deepcopy
from random import Random
from typing import Any

# Processor time for one input: 2 s on a machine that counts a million in 10 ms, more on a slower
# one (an emulated one takes twenty times as long).
SLOW = 200.0 * max(
    0.010, min(timeit.repeat("sum(range(1_000_000))", timer=time.process_time, number=1, repeat=3))
)
ACCEPTED = "accepted"


class Target:
    """A decoder under test; each input is fed on its own."""

    name: str
    refusals: tuple[type[Exception], ...] = ()
    words: tuple[bytes, ...] = ()  # tokens that mean something to the decoder
    shaped = False  # half of what `damaged` returns is fed without further mutation

    def real(self, random: Random) -> tuple[bytes, Any]:
        """Return a message as the other side sends it, and its meaning."""
        raise NotImplementedError

    def damaged(self, random: Random) -> bytes:
        """Return a message that is still partly well-formed, to be mutated further."""
        return self.real(random)[0]

    def feed(self, data: bytes) -> Any:
        """Decode the input, and feed the result to its consumer. Raises: `refusals`."""
        raise NotImplementedError

    def state(self) -> object:
        """Return the state that no input may change."""
        return None

    def close(self) -> None:
        """Release what the target holds."""


class FoundError(Exception):
    """An input that breaks a rule."""

    def __init__(self, target: Target, data: bytes, what: str) -> None:
        super().__init__(
            f"{target.name}: {what}\n  input: {data.hex()}\n"
            f"  again: .venv/bin/python -m tests.fuzz --target {target.name} --hex {data.hex()}"
        )

    def report(self) -> None:
        """Print the finding and its cause."""
        print(self, flush=True)
        if self.__cause__ is not None:
            traceback.print_exception(self.__cause__, file=sys.stdout)


def judge(target: Target, data: bytes, meaning: tuple[Any, ...], before: object) -> str:
    """Feed one input; return "accepted", or the refusal's class. Raises: FoundError."""
    began = time.process_time()
    try:
        got = target.feed(data)
    except target.refusals as error:
        outcome = type(error).__name__
        if meaning:
            raise FoundError(target, data, f"refused a real message, {error}") from error
    except Exception as error:
        raise FoundError(target, data, f"raised {error!r:.500}") from error
    else:
        outcome = ACCEPTED
        if meaning and got != meaning[0]:
            raise FoundError(target, data, f"decoded as {got!r}\n  instead of {meaning[0]!r}")
    if target.state() != before:
        raise FoundError(target, data, f"changed state, {outcome}")
    if (took := time.process_time() - began) > SLOW:
        raise FoundError(target, data, f"took {took:.1f} s, {outcome}")
    return outcome


def mutate_tree(random: Random, tree: Any, others: tuple[Any, ...]) -> None:
    """Replace or delete one element of a tree of dicts and lists."""
    while tree:
        keys = list(tree) if isinstance(tree, dict) else range(len(tree))
        key = random.choice(keys)
        if isinstance(tree[key], dict | list) and tree[key] and random.random() < 0.9:
            tree = tree[key]
        elif random.random() < 0.15:
            del tree[key]
            return
        else:
            tree[key] = deepcopy(random.choice(others))
            return
