"""Judge worlds one after the other, with progress and a final table."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TextIO

from tests.system.oracle.generate import world
from tests.system.oracle.judge import Judge, Tally
from tests.system.oracle.two_namespaces import TwoNamespaces

REPORT_EVERY = 10.0


def settings(seed: int, cases: int) -> tuple[int, int]:
    """Return ORACLE_SEED and ORACLE_CASES, by default the arguments."""
    return int(os.environ.get("ORACLE_SEED") or seed), int(os.environ.get("ORACLE_CASES") or cases)


def run(
    namespaces: TwoNamespaces, seed: int, cases: int, out: TextIO, shrinks: bool = True
) -> Tally:
    """Judge the worlds of seed, seed + 1, … until `cases` calls are counted.

    Raises: WrongAnswerError, HarnessError.
    """
    return asyncio.run(_run(Judge(namespaces, shrinks), seed, cases, out))


async def _run(judge: Judge, seed: int, cases: int, out: TextIO) -> Tally:
    out.write(f"ORACLE_SEED={seed} ORACLE_CASES={cases}\n")
    namespaces, tally = judge.namespaces, judge.tally
    began = last = time.monotonic()
    await namespaces.prepare()
    try:
        while tally.cases < cases:
            names, translates = namespaces.devices.names, namespaces.container.can_translate
            await judge.judge(world(seed + tally.worlds, namespaces.device, names, translates))
            if time.monotonic() - last > REPORT_EVERY:
                last = time.monotonic()
                out.write(f"{tally.cases:>9} cases in {last - began:.0f} s, none wrong\n")
                out.flush()
    finally:
        await judge.end()
    seconds = time.monotonic() - began
    out.write(f"{tally}\n{seconds:.1f} s, {tally.cases / seconds:.0f} cases a second\n")
    return tally
