"""The whole scenario, from a seed: load, measure, bring up, change under traffic, kill, measure."""

from __future__ import annotations

import signal
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TextIO

from tests.hub.changes import CHANGES, WEIGHTS
from tests.hub.closing import HEAD, Closings, Probe, measure
from tests.hub.tunnels import Tunnel
from tests.hub.world import Evidence, Hub, build_hub

AT_ONCE = 5  # tunnels that change together
ONE = "ipsecgate-one"  # the lab of the hub with one tunnel
PERIOD = 0.2  # seconds between two sends to one target
SETTLED = 2.0  # seconds without a change before a controller is killed
DEAD = (0.5, 3.0)  # seconds without a controller
LONG = 15.0  # seconds until a tunnel works again: worth a line
STEP_EVERY = 30.0  # seconds between two steps that are shown where there is no terminal
PART = 250  # connections loaded between two lines of progress


@dataclass(frozen=True)
class Size:
    """How much of everything. Half of `up` and of `down` are sites; `deletions`: in each phase."""

    sites: int = 500
    warriors: int = 2000
    up: int = 50
    down: int = 16  # sent to and never up
    changes: int = 200
    deletions: int = 60
    kills: int = 3


class Progress:
    """Lines of text, and the present step: overwritten on a terminal, else one now and then."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._clear = "\r\033[K" if out.isatty() else ""
        self._due = time.monotonic() + STEP_EVERY

    def step(self, text: str) -> None:
        if self._clear:
            self._out.write(self._clear + text)
            self._out.flush()
        elif time.monotonic() > self._due:
            self.line(text)
            self._due = time.monotonic() + STEP_EVERY

    def line(self, text: str) -> None:
        self._out.write(f"{self._clear}{text}\n")
        self._out.flush()


def run(cache: Path, seed: int, size: Size, out: TextIO) -> Evidence:
    """Run the scenario and print its tables. Raises: AssertionError if anything is wrong."""
    began, dice, progress = time.monotonic(), Random(seed), Progress(out)
    progress.line(f"seed {seed}")
    with ExitStack() as stack:
        hub = stack.enter_context(build_hub(cache, seed, size.sites, size.warriors))
        one = stack.enter_context(build_hub(cache, seed, 1, 0, ONE))
        tunnel, up, down = choose(hub.tunnels, dice, size)
        probes = [start_probe(one, one.tunnels[0]), start_probe(hub, tunnel)]
        loaded = f"{len(hub.tunnels):,} loaded"
        table: list[Closings] = []

        def close(state: str) -> None:
            progress.step(f"deleting SAs: {state}")
            table.extend(measure(probes, (f"one tunnel, while {state}", state), size.deletions))

        close("one loaded")
        load_all(hub, tunnel, progress)
        close(loaded)
        hub.add_peers(up)
        progress.step(f"waiting for {len(up)} tunnels")
        hub.start(up, down, PERIOD)
        progress.line(f"{len(up)} tunnels are up; {len(down)} are sent to and never up")
        change(hub, dice, size.changes, progress)
        kill(hub, dice, size.kills, progress)
        close(f"{loaded}, {len(up)} up")
        hub.judge()
        for probe in probes:
            probe.end()
    progress.line(hub.evidence.text())
    progress.line(HEAD)
    for alone, closings in zip(table[::2], table[1::2], strict=True):
        progress.line(alone.row(alone))
        progress.line(closings.row(alone))
    progress.line(f"seed {seed}, {time.monotonic() - began:.0f} s")
    hub.evidence.check()
    return hub.evidence


def start_probe(hub: Hub, tunnel: Tunnel) -> Probe:
    """Load a tunnel that is measured, and nothing else yet."""
    hub.add_peers([tunnel])
    hub.load([tunnel])
    hub.wait_known(1)
    return Probe(hub, tunnel)


def choose(
    tunnels: Sequence[Tunnel], dice: Random, size: Size
) -> tuple[Tunnel, list[Tunnel], list[Tunnel]]:
    """Return the tunnel to measure, those to bring up, and those that never answer."""
    up, down = size.up // 2, size.down // 2
    probe, *sites = dice.sample([t for t in tunnels if t.is_site], 1 + up + down)
    warriors = dice.sample([t for t in tunnels if not t.is_site], up + down)
    return probe, [*sites[down:], *warriors[down:]], [*sites[:down], *warriors[:down]]


def load_all(hub: Hub, probe: Tunnel, progress: Progress) -> None:
    """Load every connection while the gate runs; say how long strongSwan and the gate take."""
    began = time.monotonic()
    rest = [tunnel for tunnel in hub.tunnels if tunnel is not probe]
    for at in range(0, len(rest), PART):
        progress.step(f"loading {at:,} of {len(rest):,} connections")
        hub.load(rest[at : at + PART])
    loaded = time.monotonic()
    progress.step("waiting for the gate to know them all")
    hub.wait_known(len(hub.tunnels))
    known = time.monotonic()
    tables = hub.gate.status()["hook_tables"]
    assert not hub.gate.ask()["errors"]
    progress.line(
        f"{len(hub.tunnels):,} connections loaded over VICI in {loaded - began:.1f} s, known to "
        f"the gate {known - loaded:.1f} s later\n"
        f"SPD: {tables['spd_entries']} entries, {tables['spd_masks']} masks; "
        f"POLICY: {tables['policy_entries']} entries, {tables['policy_masks']} masks; "
        f"controller {hub.gate.memory():.0f} MiB"
    )


def change(hub: Hub, dice: Random, count: int, progress: Progress) -> None:
    """Change tunnels under traffic, several at once, and wait each time until all work again."""
    done: Counter[str] = Counter()
    took: list[float] = []
    while done.total() < count:
        changed = dice.sample(hub.up, min(AT_ONCE, len(hub.up)))
        names = dice.choices(list(CHANGES), WEIGHTS, k=len(changed))
        for tunnel, name in zip(changed, names, strict=True):
            CHANGES[name](hub, tunnel, dice)
        began = time.monotonic()
        done.update(names)
        took.append(hub.recover(changed) - began)
        hub.judge()
        wrong = len(hub.evidence.wrong) + len(hub.evidence.leaked)
        progress.step(f"{done.total()} of {count} changes, {wrong} wrong; last {took[-1]:.1f} s")
        if took[-1] > LONG:
            what = ", ".join(f"{t.name}: {n}" for t, n in zip(changed, names, strict=True))
            progress.line(f"{took[-1]:.0f} s until these worked again: {what}")
    if not took:
        return
    hub.recover(hub.up)
    counts = ", ".join(f"{number} {name}" for name, number in sorted(done.items()))
    progress.line(
        f"{done.total()} changes under traffic: {counts}; all worked again after "
        f"{statistics.median(took):.1f} s, at most {max(took):.1f} s"
    )


def kill(hub: Hub, dice: Random, count: int, progress: Progress) -> None:
    """Kill the controller under traffic, and start it again a moment later."""
    took = []
    for number in range(count):
        progress.step(f"killing the controller, {number + 1} of {count}")
        time.sleep(SETTLED)
        hub.gate.kill(signal.SIGKILL)
        time.sleep(dice.uniform(*DEAD))
        began = time.monotonic()
        hub.gate.start()
        took.append(time.monotonic() - began)
        hub.recover(hub.up)
        hub.judge()
    if took:
        progress.line(
            f"controller killed {count} times; its successor ready after "
            f"{statistics.median(took):.1f} s, at most {max(took):.1f} s"
        )
