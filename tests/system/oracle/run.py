"""Worlds one after the other, with progress and a closing table."""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path
from typing import TextIO

from tests.system.oracle.bed import bed
from tests.system.oracle.generate import world
from tests.system.oracle.judge import Judge, Tally, WrongAnswerError

REPORT_EVERY = 5.0


def settings(cases: int) -> tuple[int, int]:
    """Return (seed, cases): ORACLE_SEED, else a new one; ORACLE_CASES, else what is given."""
    seed = os.environ.get("ORACLE_SEED") or random.SystemRandom().randrange(2**32)
    return int(seed), int(os.environ.get("ORACLE_CASES") or cases)


async def judge_worlds(judge: Judge, seed: int, cases: int, out: TextIO) -> Tally:
    """Judge worlds of seed, seed + 1, … until so many calls are counted."""
    out.write(f"ORACLE_SEED={seed} ORACLE_CASES={cases}\n")
    began = last = time.monotonic()
    await judge.bed.prepare()
    while judge.tally.cases < cases:
        await judge.judge(world(seed + judge.tally.worlds, judge.bed.device))
        if time.monotonic() - last > REPORT_EVERY:
            last = time.monotonic()
            out.write(f"{judge.tally.cases} cases in {last - began:.0f} s\n")
            out.flush()
    await judge.end()
    seconds = time.monotonic() - began
    out.write(f"{judge.tally}\n{judge.tally.cases / seconds:.0f} cases a second, {seconds:.1f} s\n")
    return judge.tally


def run(cache: Path, seed: int, cases: int, out: TextIO) -> int:
    """Do it all; return an exit code."""
    with bed(cache) as place:
        try:
            asyncio.run(judge_worlds(Judge(place), seed, cases, out))
        except WrongAnswerError as error:
            out.write(f"WRONG\n{error}\n")
            return 1
    return 0
