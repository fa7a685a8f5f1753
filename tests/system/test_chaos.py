"""No packet leaks: the short form of `make chaos`, see `tests.chaos`.

CHAOS_SEED and CHAOS_FAULTS set the seed and the number of faults. Three tests check the checks: a
gate that opens for a moment must be caught.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipsecgate.admin import loader
from ipsecgate.core.tables.layout import TableId
from ipsecgate.edges.bpf.bytecode import Bytecode
from tests.chaos import hammer, restarts
from tests.chaos.build_world import build_world
from tests.chaos.run import run
from tests.chaos.soak import soak
from tests.chaos.tally import Tally
from tests.chaos.targets import NEVER
from tests.chaos.world import World
from tests.system.hooked_cgroup import HookedCgroup, live
from tests.until import wait_until

SEED = int(os.environ.get("CHAOS_SEED", "1"))
FAULTS = int(os.environ.get("CHAOS_FAULTS", "30"))
ATTEMPTS, TURNS, RESTARTS = 20_000, 12, 4
REKEYS = 60
MOMENT = 0.02  # seconds: a guest has one processor, and the hammer must get it meanwhile


@pytest.fixture(scope="module")
def world(cache: Path) -> Iterator[World]:
    with build_world(cache, "ipsecgate-test-chaos") as made:
        yield made


def test_no_fault_lets_a_packet_out(world: World) -> None:
    assert run(world, SEED, FAULTS, sys.stdout) >= FAULTS


def test_restarts_under_constant_calls(world: World) -> None:
    result = restarts.hammer_gate(world, random.Random(SEED), ATTEMPTS, RESTARTS)
    sys.stdout.write(f"seed {SEED}: {result.figures()}\n")
    result.check(ATTEMPTS, RESTARTS)


def test_rekeys_leave_nothing_behind(world: World) -> None:
    soak(world, random.Random(SEED), REKEYS, sys.stdout)


def test_a_leak_is_detected(world: World) -> None:
    """This must be the last test of this world, because it makes the gate leak."""
    world.tally = Tally()
    began = time.monotonic()

    def is_let_go() -> bool:
        reports = zip(world.sender.ask(), world.targets, strict=True)
        return all(r["good"] > began for r, (_, address, _) in reports if address == NEVER)

    loader.detach(world.gate.paths, str(world.gate.cgroup))
    wait_until(is_let_go, "no call to an uncovered target succeeded")
    loader.attach(world.gate.paths, str(world.gate.cgroup))
    world.judge()
    assert world.tally.leaked
    assert world.tally.let_go
    with pytest.raises(AssertionError, match="packets in clear"):
        world.tally.check()


def test_replaced_hooks_under_constant_calls(cache: Path) -> None:
    result = hammer.hammer_hooks(cache, random.Random(SEED), ATTEMPTS, TURNS)
    sys.stdout.write(f"seed {SEED}: {result.figures()}\n")
    result.check(ATTEMPTS, TURNS)


def test_a_moment_without_hooks_is_detected(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken_off_and_put_on(hooked: HookedCgroup, code: Bytecode, rng: random.Random) -> None:
        hooked.pins.detach(hooked.cgroup.stat().st_ino)
        time.sleep(MOMENT)
        hooked.pins.attach(hooked.cgroup)

    monkeypatch.setattr(hammer, "TURNS", [taken_off_and_put_on])
    result = hammer.hammer_hooks(cache, random.Random(1), ATTEMPTS, TURNS)
    assert result.let_go
    assert result.leaked
    with pytest.raises(AssertionError, match="wrongly allowed"):
        result.check(ATTEMPTS, TURNS)


def test_a_table_emptied_before_it_is_replaced_is_detected(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def emptied(hooked: HookedCgroup, code: Bytecode, rng: random.Random) -> None:
        hooked.publish(TableId.SPD)
        time.sleep(MOMENT)
        hooked.publish(TableId.SPD, live()[0])

    monkeypatch.setattr(hammer, "TURNS", [emptied])
    result = hammer.hammer_hooks(cache, random.Random(1), ATTEMPTS, TURNS)
    assert result.refused
    assert not result.let_go
