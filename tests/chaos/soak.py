"""Thousands of rekeys under traffic: what the controller holds stays what it is.

A year of hourly rekeys is nine thousand. The first part of them is warm-up; what is remembered
of refusals, which has a limit, is filled before.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from ipsecgate.edges.bpf.maps import Maps
from ipsecgate.edges.bpf.pins import Pins
from tests.chaos.tools import storm_at_never, vici
from tests.chaos.world import SPECS, World

SAMPLES = 50
WARM_UP = 0.2  # of the rekeys
PATIENCE = 3.0  # seconds until one that came to nothing is asked for again
# What may lie between the most and the least of each: a client that asks, a table that is
# being cleared. The memory is judged by its trend.
BOUNDS = {"fds": 4, "threads": 2, "tasks": 4, "timers": 4, "entries": 40, "pins": 0}
GROWTH = 1024  # KiB over the whole of the measured part, by least squares


@dataclass(frozen=True, slots=True)
class Sample:
    """What the controller held after so many rekeys."""

    rekeys: int
    held: dict[str, int]


def soak(world: World, rng: random.Random, rekeys: int, out: TextIO) -> None:
    """Rekey so often, in turn and by both sides, and print what was held meanwhile.

    Raises: AssertionError for what grows, a packet in clear, a call that was wrongly refused.
    """
    storm_at_never(world)
    process = world.gate.process
    assert process is not None
    samples: list[Sample] = []
    began = time.monotonic()
    done = 0
    for done in rekeyed(world, rng, rekeys):
        if done % max(1, rekeys // SAMPLES) == 0:
            samples.append(Sample(done, held(world, process.pid)))
            world.judge()
    world.recover()
    world.wait_streams()
    world.judge()
    assert process.poll() is None, "another controller than in the beginning"
    measured = [s for s in samples if s.rekeys >= rekeys * WARM_UP]
    out.write(f"\n{done} rekeys in {time.monotonic() - began:.0f} s, after warm-up:\n")
    for name in measured[0].held:
        values = [s.held[name] for s in measured]
        slope = trend([(s.rekeys, s.held[name]) for s in measured])
        out.write(
            f"  {name:8} {values[0]} -> {values[-1]}, {min(values)} to {max(values)}, "
            f"{slope * 1000:+.2f} per 1,000 rekeys\n"
        )
    tally = world.tally
    out.write(
        f"  {tally.attempts} attempts, leaked {len(tally.leaked)}, "
        f"wrongly refused {len(tally.wrong)}, {tally.streams} TCP connections stood through it\n"
    )
    out.flush()
    for name, bound in BOUNDS.items():
        values = [s.held[name] for s in measured]
        assert max(values) - min(values) <= bound, f"{name}: {values}"
    span = measured[-1].rekeys - measured[0].rekeys
    slope = trend([(s.rekeys, s.held["rss KiB"]) for s in measured])
    assert slope * span <= GROWTH, f"the controller grew by {slope * span:.0f} KiB"
    tally.check()


def rekeyed(world: World, rng: random.Random, rekeys: int) -> Iterator[int]:
    """Rekey one child after the other; yield how many were after each, an old SA being gone."""
    for done in range(1, rekeys + 1):
        spec = SPECS[done % len(SPECS)]
        host = rng.choice([world.lab.a, world.lab.b])
        if done % 25 == 0:
            vici(host, "rekey", ike=spec.name)  # besides
        seen = len(world.kernel_events.events())
        asked = 0.0
        while not any(
            e.name == "DELSA" and e.outbound for e in world.kernel_events.events()[seen:]
        ):
            if time.monotonic() > asked + PATIENCE:
                vici(host, "rekey", child=spec.child_name)
                asked = time.monotonic()
            time.sleep(0.002)
        yield done


def held(world: World, pid: int) -> dict[str, int]:
    """Return what a controller holds, and what is pinned for it."""
    told = world.gate.ask()
    pins = Pins(world.gate.paths.bpffs, world.gate.instance)
    with Maps(pins) as maps:
        entries = maps.entry_count()
    status = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    words = {line[0]: line[1] for line in status if line[1:]}
    return {
        "fds": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads": int(words["Threads:"]),
        "tasks": told["tasks"],
        "timers": told["timers"],
        "entries": entries,
        "pins": sum(1 for path in pins.root.rglob("*") if path.is_file()),
        "rss KiB": int(words["VmRSS:"]),
    }


def trend(points: list[tuple[int, int]]) -> float:
    """Return the slope of the line that fits best: least squares."""
    count = len(points)
    mean_x = sum(x for x, _ in points) / count
    mean_y = sum(y for _, y in points) / count
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
