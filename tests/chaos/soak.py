"""Thousands of rekeys under traffic: the controller's use of resources must not grow.

A year of hourly rekeys is nine thousand. The first part is a warm-up. The bounded record of recent
refusals is filled before.
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
from tests.chaos.fault_tools import storm_at_never, vici
from tests.chaos.targets import SPECS
from tests.chaos.world import World

SAMPLES = 50
WARM_UP = 0.2  # of the rekeys
RETRY = 3.0  # seconds until a rekey without effect is requested again
# Allowed difference between maximum and minimum: a client may be connected, or a table being
# cleared. Memory is judged by its trend.
BOUNDS = {"fds": 4, "threads": 2, "tasks": 4, "timers": 4, "entries": 40, "pins": 0}
GROWTH = 1024  # KiB over the measured part, by least squares


@dataclass(frozen=True, slots=True)
class Sample:
    """The resources that the controller held after a number of rekeys."""

    rekeys: int
    held: dict[str, int]


def soak(world: World, rng: random.Random, rekeys: int, out: TextIO) -> None:
    """Rekey the children in turn, from both sides, and print the resources held meanwhile.

    Raises: AssertionError if a resource grows, for a packet in clear or a wrongly refused call.
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
    assert process.poll() is None, "the controller was restarted"
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
        f"wrongly refused {len(tally.wrong)}, {tally.streams} TCP connections survived\n"
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
    """Rekey one child after the other; yield the number so far each time an old SA is gone."""
    for done in range(1, rekeys + 1):
        spec = SPECS[done % len(SPECS)]
        host = rng.choice([world.lab.a, world.lab.b])
        if done % 25 == 0:
            vici(host, "rekey", ike=spec.name)  # the IKE_SA, too
        seen = len(world.recorder.events())
        requested = 0.0
        while not any(e.name == "DELSA" and e.outbound for e in world.recorder.events()[seen:]):
            if time.monotonic() > requested + RETRY:
                vici(host, "rekey", child=spec.child_name)
                requested = time.monotonic()
            time.sleep(0.002)
        yield done


def held(world: World, pid: int) -> dict[str, int]:
    """Return the resources of a controller, including its pinned objects."""
    status_document = world.gate.ask()
    pins = Pins(world.gate.paths.bpffs, world.gate.instance)
    with Maps(pins) as maps:
        entries = maps.entry_count()
    status = [line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    words = {line[0]: line[1] for line in status if line[1:]}
    return {
        "fds": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads": int(words["Threads:"]),
        "tasks": status_document["tasks"],
        "timers": status_document["timers"],
        "entries": entries,
        "pins": sum(1 for path in pins.root.rglob("*") if path.is_file()),
        "rss KiB": int(words["VmRSS:"]),
    }


def trend(points: list[tuple[int, int]]) -> float:
    """Return the slope of the least-squares line."""
    count = len(points)
    mean_x = sum(x for x, _ in points) / count
    mean_y = sum(y for _, y in points) / count
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
