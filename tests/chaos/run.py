"""Run random faults in turn, from a seed, and print a table of the results."""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TextIO

from ipsecgate.edges.host.saved_state import load_children
from tests.chaos import faults_gate, faults_kernel, faults_operator, faults_scarce
from tests.chaos.fault import Fault, draw
from tests.chaos.tally import TOLERANCE
from tests.chaos.targets import SPECS
from tests.chaos.world import NotRecoveredError, World

KINDS = (
    faults_gate,
    faults_kernel,
    faults_operator,
    faults_scarce,
)  # importing them registers their faults
BATCH = 20
HOLD = (0.01, 0.15)
SHOWN = 10
SETTLE_TIMEOUT = 60.0  # seconds: three periods of the controller's regular check


@dataclass
class Kind:
    """One row of the table."""

    times: list[float] = field(default_factory=list)  # seconds to recovery

    def row(self, name: str) -> str:
        median, worst = statistics.median(self.times), max(self.times)
        return f"{name:48} {len(self.times):5d} {median * 1000:9.0f} {worst * 1000:9.0f}"


@dataclass(frozen=True, slots=True)
class Round:
    """One or two faults, from the strike to the recovery."""

    name: str
    began: float
    recovered: float
    seconds: float  # from the end of the fault to the recovery


def chosen_seed() -> int:
    """Return CHAOS_SEED if set, else a random seed."""
    return int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(1 << 32))


def run(world: World, seed: int, faults: int, out: TextIO) -> int:
    """Run at least this many faults and print the table; return the number of faults.

    Raises: AssertionError for a leak, a fault without recovery, or a wrongly refused call.
    """
    rng = random.Random(seed)
    kinds: dict[str, Kind] = defaultdict(Kind)
    rounds: list[Round] = []
    began = time.monotonic()
    struck = 0
    out.write(f"seed {seed}\n")
    while struck < faults:
        chosen = draw(rng)
        last = play(world, chosen, rng, out)
        struck += len(chosen)
        kinds[chosen[0].name if len(chosen) == 1 else "two at once"].times.append(last.seconds)
        rounds.append(last)
        if "CHAOS_VERBOSE" in os.environ:
            took = last.recovered - last.began
            out.write(f"{name_of(chosen)}: {took:.2f} s, {last.seconds:.2f}\n")
        if len(rounds) % BATCH == 0:
            report_wrong(world, rounds, out)
            out.write(f"{struck} faults in {time.monotonic() - began:.0f} s\n")
            out.flush()
    world.wait_streams()
    report_wrong(world, rounds, out)
    table(world, kinds, struck, time.monotonic() - began, seed, out)
    world.tally.check()
    return struck


def name_of(chosen: list[Fault]) -> str:
    return " + ".join(chosen_fault.name for chosen_fault in chosen)


def play(world: World, chosen: list[Fault], rng: random.Random, out: TextIO) -> Round:
    """Apply the faults together, undo them, and measure the time until everything works again."""
    name = name_of(chosen)
    if "CHAOS_VERBOSE" in os.environ:
        out.write(f"{name} ...\n")
        out.flush()
    keeps = all(fault.keeps for fault in chosen)
    if keeps:
        wait_idle(world)
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        for fault in chosen:
            # Give each fault its own generator: how often it uses it may depend on the situation.
            stack.enter_context(fault.strike(world, random.Random(rng.getrandbits(32))))
        time.sleep(rng.uniform(*HOLD))
    world.mend()
    mended = time.monotonic()
    try:
        recovered = world.recover()
        settle(world)
    except NotRecoveredError as error:
        out.write(f"NOT RECOVERED from {name}: {error}\n")
        out.flush()
        world.tally.not_recovered.append(name)
        world.renew()
        recovered, keeps = time.monotonic(), False
    if not keeps:
        world.disturbed.append((began, recovered))
    return Round(name, began, recovered, recovered - mended)


def wait_idle(world: World) -> None:
    """Wait until IKE has completed everything that earlier faults caused, and everything works.

    A lost deletion is retransmitted after 1.5 s, and would end coverage during the next fault.
    """
    deadline = time.monotonic() + SETTLE_TIMEOUT
    while any(host.charon.busy(spec.name for spec in SPECS) for host in (world.lab.a, world.lab.b)):
        if time.monotonic() > deadline:
            raise NotRecoveredError(f"IKE is busy\n{world.diagnosis()}")
        time.sleep(0.05)
    world.recover()


def settle(world: World) -> None:
    """Wait until all of strongSwan's connections are saved to disk. Raises: NotRecoveredError."""
    began = time.monotonic()
    with world.lab.a.charon.session() as session:
        conns = [conn for each in session.list_conns() for conn in each.values()]
    wanted = {
        remote.decode()
        for conn in conns
        for child in conn["children"].values()
        for remote in child["remote-ts"]
    }
    while True:
        saved = load_children(world.gate.paths.remembered)
        missing = wanted - {str(selector.network) for child in saved for selector in child.remote}
        if not missing:
            return
        if time.monotonic() > began + SETTLE_TIMEOUT:
            raise NotRecoveredError(f"{missing} not saved\n{world.diagnosis()}")
        world.supervise()
        time.sleep(0.05)


def report_wrong(world: World, rounds: list[Round], out: TextIO) -> None:
    """Judge the results since the last call; print the first wrong ones."""
    tally = world.tally
    known = len(tally.wrong), len(tally.leaked)
    world.judge()
    wrong = [*tally.wrong[known[0] :]]
    wrong += [(str(packet), packet.time) for packet in tally.leaked[known[1] :]]
    for text, when in wrong[:SHOWN]:
        struck = [
            f"{r.name} ({when - r.began:+.3f} s, recovered {r.recovered - r.began:+.3f})"
            for r in rounds
            if r.began - TOLERANCE <= when <= r.recovered + 1
        ]
        out.write(f"WRONG: {text} during {struck}\n")


def table(
    world: World, kinds: dict[str, Kind], struck: int, seconds: float, seed: int, out: TextIO
) -> None:
    tally = world.tally
    out.write(f"\n{'fault':48} {'count':>5} {'recovery':>9} {'max, ms':>9}\n")
    for name, kind in sorted(kinds.items()):
        out.write(kind.row(name) + "\n")
    everything = Kind([t for kind in kinds.values() for t in kind.times])
    out.write(everything.row("all") + "\n")
    exits = f"; the controller exited by itself {len(tally.exits)} times" if tally.exits else ""
    out.write(
        f"\nseed {seed}: {struck} faults in {seconds:.0f} s, {tally.attempts} attempts, "
        f"{tally.refused} refused, {tally.blocked} packets blocked\n"
        f"leaked {len(tally.leaked)}, wrongly allowed {tally.let_go}, "
        f"wrongly refused {len(tally.wrong)}\n"
        f"on the wire: {tally.esp} ESP, {tally.in_clear} in clear to the open peer, "
        f"{tally.icmp_errors} ICMP errors from the kernel; "
        f"{tally.streams} TCP connections survived{exits}\n"
        f"calls of the held process: {tally.calls}, held {tally.held}, longest "
        f"{tally.longest:.1f} s; {len(tally.late)} did not end, {len(tally.unexpected)} failed "
        f"with an undocumented error\n"
    )
    unsaved = world.gate.log.read_text().count("cannot write")
    out.write(f"the controller could not save its state {unsaved} times\n")
    errors = ", ".join(f"{name} {count}" for name, count in sorted(tally.errors.items()))
    out.write(f"calls returned: {errors}\n")
    for log in sorted(set(tally.exits)):
        out.write(f"  its log: {log}\n")
    out.flush()
