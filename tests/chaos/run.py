"""The faults in turn, from a seed, and the table of what came of them."""

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
from tests.chaos.world import SPECS, NotRecoveredError, World

KINDS = (
    faults_gate,
    faults_kernel,
    faults_operator,
    faults_scarce,
)  # which register what they have
BATCH = 20
HOLD = (0.01, 0.15)
SHOWN = 10
SETTLED = 60.0  # seconds, three pulses of the controller's


@dataclass
class Kind:
    """One row of the table."""

    times: list[float] = field(default_factory=list)  # seconds to recovery

    def row(self, name: str) -> str:
        median, worst = statistics.median(self.times), max(self.times)
        return f"{name:48} {len(self.times):5d} {median * 1000:9.0f} {worst * 1000:9.0f}"


@dataclass(frozen=True, slots=True)
class Round:
    """What struck when, until all was well."""

    name: str
    began: float
    recovered: float
    seconds: float  # from the end of it


def chosen_seed() -> int:
    """Return CHAOS_SEED, else a new one."""
    return int(os.environ.get("CHAOS_SEED") or random.SystemRandom().randrange(1 << 32))


def run(world: World, seed: int, faults: int, out: TextIO) -> int:
    """Strike so often and print the table; return how many struck.

    Raises: AssertionError for a leak, what did not recover, a call that was wrongly refused.
    """
    rng = random.Random(seed)
    kinds: dict[str, Kind] = defaultdict(Kind)
    rounds: list[Round] = []
    began = time.monotonic()
    struck = 0
    out.write(f"seed {seed}\n")
    while struck < faults:
        chosen = draw(rng)
        one = play(world, chosen, rng, out)
        struck += len(chosen)
        kinds[chosen[0].name if len(chosen) == 1 else "two at once"].times.append(one.seconds)
        rounds.append(one)
        if "CHAOS_VERBOSE" in os.environ:
            out.write(f"{name_of(chosen)}: {one.recovered - one.began:.2f} s, {one.seconds:.2f}\n")
        if len(rounds) % BATCH == 0:
            tell_wrong(world, rounds, out)
            out.write(f"{struck} faults in {time.monotonic() - began:.0f} s\n")
            out.flush()
    world.wait_streams()
    tell_wrong(world, rounds, out)
    table(world, kinds, struck, time.monotonic() - began, seed, out)
    world.tally.check()
    return struck


def name_of(chosen: list[Fault]) -> str:
    return " + ".join(one.name for one in chosen)


def play(world: World, chosen: list[Fault], rng: random.Random, out: TextIO) -> Round:
    """Have faults strike at once, undo them, and see how long it takes until all is well."""
    name = name_of(chosen)
    if "CHAOS_VERBOSE" in os.environ:
        out.write(f"{name} ...\n")
        out.flush()
    keeps = all(one.keeps for one in chosen)
    if keeps:
        rest(world)
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        for one in chosen:
            # Its own dice: how often it throws them may depend on what there is to strike.
            stack.enter_context(one.strike(world, random.Random(rng.getrandbits(32))))
        time.sleep(rng.uniform(*HOLD))
    world.mend()
    mended = time.monotonic()
    try:
        recovered = world.recover()
        settle(world)
    except NotRecoveredError as error:
        out.write(f"NOT RECOVERED from {name}: {error}\n")
        out.flush()
        world.tally.stuck.append(name)
        world.renew()
        recovered, keeps = time.monotonic(), False
    if not keeps:
        world.troubles.append((began, recovered))
    return Round(name, began, recovered, recovered - mended)


def rest(world: World) -> None:
    """Wait until IKE has done all that the faults before asked of it, and all is well.

    A deletion that was lost comes again after 1.5 s: nobody keeps what goes by that.
    """
    deadline = time.monotonic() + SETTLED
    while any(host.charon.busy(spec.name for spec in SPECS) for host in (world.lab.a, world.lab.b)):
        if time.monotonic() > deadline:
            raise NotRecoveredError(f"IKE is busy\n{world.last_words()}")
        time.sleep(0.05)
    world.recover()


def settle(world: World) -> None:
    """Wait until all that strongSwan has loaded is on the disk. Raises: NotRecoveredError."""
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
        kept = load_children(world.gate.paths.remembered)
        missing = wanted - {str(one.network) for child in kept for one in child.remote}
        if not missing:
            return
        if time.monotonic() > began + SETTLED:
            raise NotRecoveredError(f"{missing} not remembered\n{world.last_words()}")
        world.supervise()
        time.sleep(0.05)


def tell_wrong(world: World, rounds: list[Round], out: TextIO) -> None:
    """Judge what was said since the last time; tell the first things that are wrong."""
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
    ended = f"; the controller ended by itself {len(tally.ended)} times" if tally.ended else ""
    out.write(
        f"\nseed {seed}: {struck} faults in {seconds:.0f} s, {tally.attempts} attempts, "
        f"{tally.refused} refused, {tally.blocked} packets blocked\n"
        f"leaked {len(tally.leaked)}, let go uncovered {tally.let_go}, "
        f"wrongly refused {len(tally.wrong)}\n"
        f"seen on the wire: {tally.esp} ESP, {tally.in_clear} in clear to an open peer, "
        f"{tally.complaints} ICMP errors of the kernel's own; "
        f"{tally.streams} TCP connections stood through it{ended}\n"
        f"{tally.calls} calls that may be held, {tally.held} of them were, the longest "
        f"{tally.longest:.1f} s; {len(tally.late)} did not end, {len(tally.strange)} failed as "
        f"none may\n"
    )
    unkept = world.gate.log.read_text().count("cannot write")
    out.write(f"the disk took nothing {unkept} times when there was more to be remembered\n")
    errors = ", ".join(f"{name} {count}" for name, count in sorted(tally.errors.items()))
    out.write(f"calls returned: {errors}\n")
    for said in sorted(set(tally.ended)):
        out.write(f"  it said: {said}\n")
    out.flush()
