"""Kill, stop and reload a whole gate under constant connect() calls, with real IKE and ESP."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable

from ipsecgate.admin import loader
from tests.chaos.fault_tools import reload
from tests.chaos.faults_operator import policies_configured_then_derived
from tests.chaos.hammer import Hammer, Hammered, Target
from tests.chaos.targets import CLOSED_PORT, NEVER, SPECS
from tests.chaos.world import World


def hammer_gate(world: World, rng: random.Random, attempts: int, turns: int) -> Hammered:
    """Call connect() at least `attempts` times during `turns` restarts; coverage never changes."""
    covered = str(world.lab.b.address(SPECS[0]))
    targets: list[Target] = [
        *[("udp", covered, CLOSED_PORT, True)] * 3,
        ("tcp", covered, CLOSED_PORT, True),
        *[("udp", NEVER, CLOSED_PORT, False)] * 2,
        *[("tcp", NEVER, CLOSED_PORT, False)] * 2,
    ]
    space = world.lab.a.namespace.path
    with Hammer(space, world.gate.cgroup, targets, 1, -(-attempts // turns)) as hammer:
        for _ in range(turns):
            hammer.turn(rng.choice(RESTARTS), world, rng)
            hammer.wait()
            # A held call would wait for one controller after the other: each starts within seconds
            # here, and its inspector a second later.
            world.recover()
    world.judge()
    world.tally.check()
    return hammer.result


def killed(world: World, rng: random.Random) -> None:
    time.sleep(rng.uniform(0, 0.2))
    world.gate.kill()
    world.start_gate()


def killed_while_it_starts(world: World, rng: random.Random) -> None:
    world.gate.kill()
    launcher, env, fds = world.store.words()
    argv = [*launcher, *world.gate.argv("run")]
    with world.gate.log.open("a") as log:
        process = world.lab.a.popen(argv, stdout=log, stderr=log, env=env, fds=fds)
    time.sleep(rng.uniform(0, 1.0))
    process.kill()
    process.wait()
    world.start_gate()


def terminated(world: World, rng: random.Random) -> None:
    world.gate.kill(signal.SIGTERM)
    world.start_gate()


def loaded(world: World, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 5)):
        loader.load(world.gate.paths)


def reloaded(world: World, rng: random.Random) -> None:
    with policies_configured_then_derived(world, rng):
        time.sleep(rng.uniform(0, 0.05))
    reload(world)


RESTARTS: list[Callable[[World, random.Random], None]] = [
    killed,
    killed_while_it_starts,
    terminated,
    *[loaded] * 3,
    *[reloaded] * 4,
]
