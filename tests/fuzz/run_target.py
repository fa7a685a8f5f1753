"""Run one target under libFuzzer: `python -m tests.fuzz.run_target MODULE:CLASS INPUTS SEED`.

libFuzzer measures the coverage of each input and mutates those with new coverage further. The run
ends with a line of figures, or with the first input that breaks a rule of the engine.

It needs a process of its own, because libFuzzer ends the process that it runs in.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import atheris

from tests.fuzz.engine import ACCEPTED, FoundError, Target, judge

REAL = 8  # one input of so many is a real message
WORD = 5  # one mutated input of so many gets a token of the target
RESULTS = Path(".cache/results")
OPTIONS = ("-verbosity=0", "-len_control=0", "-max_len=131072", "-rss_limit_mb=4096",
           "-timeout=60", f"-artifact_prefix={RESULTS}/")  # fmt: skip


@dataclass
class Run:
    """Makes inputs, feeds them, and counts the outcomes."""

    target: Target
    inputs: int
    seed: int
    outcomes: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._real: tuple[bytes, Any] | None = None  # the last real message, and its meaning
        self._before = self.target.state()
        self._began = time.monotonic()

    def mutate(self, data: bytes, size: int, seed: int) -> bytes:
        """Return the next input, at most `size` bytes, from the corpus or from scratch."""
        random = Random(seed)
        if seed % REAL == 0:
            self._real = self.target.real(random)
            return self._real[0]
        if not data or random.random() < 0.5:
            data = self.target.damaged(random)
        if self.target.words and random.randrange(WORD) == 0:
            at = random.randrange(len(data) + 1)
            data = data[:at] + random.choice(self.target.words) + data[at:]
        elif not self.target.shaped or random.random() < 0.5:
            data = bytes(atheris.Mutate(data, size))
        return data[:size]

    def feed(self, data: bytes) -> None:
        """Feed one input. Raises: FoundError."""
        meant = self._real[1:] if self._real is not None and self._real[0] == data else ()
        self._real = None
        try:
            self.outcomes[judge(self.target, data, meant, self._before)] += 1
        except FoundError as found:
            found.report()
            self.target.close()
            raise
        if self.outcomes.total() == self.inputs:
            print(self.figures(), flush=True)
            self.target.close()  # libFuzzer ends the process without running Python code

    def figures(self) -> str:
        """Return the counts of the outcomes, as a line."""
        refused = ", ".join(
            f"{count} {name}" for name, count in self.outcomes.most_common() if name != ACCEPTED
        )
        return (
            f"{self.target.name:<12} {self.outcomes.total():>8} inputs "
            f"{self.outcomes[ACCEPTED]:>8} accepted {time.monotonic() - self._began:>6.1f} s  "
            f"seed {self.seed}; refused: {refused or 'none'}"
        )


def main() -> None:
    """Run the target on the command line; libFuzzer ends the process."""
    where, inputs, seed = sys.argv[1:]
    module, name = where.split(":")
    with atheris.instrument_imports(include=["ipsecgate", module]):
        target: Target = getattr(import_module(module), name)()
    run = Run(target, int(inputs), int(seed))
    limits = (f"-runs={run.inputs}", f"-seed={run.seed}")
    RESULTS.mkdir(parents=True, exist_ok=True)  # libFuzzer writes an input that never ends there
    atheris.Setup([sys.argv[0], *OPTIONS, *limits], run.feed, custom_mutator=run.mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
