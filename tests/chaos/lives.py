"""The life of a whole gate under the hammer, with real IKE and ESP."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable

from ipsecgate.admin import loader
from tests.chaos.faults_operator import policies_named_then_derived
from tests.chaos.hammer import Hammer, Hammered, Target
from tests.chaos.tools import reload
from tests.chaos.world import CLOSED_PORT, NEVER, SPECS, World


def real(world: World, rng: random.Random, attempts: int, turns: int) -> Hammered:
    """Hammer a whole gate through its life; its connections stay covered."""
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
            hammer.turn(rng.choice(LIVES), world, rng)
            hammer.wait()
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


def ended(world: World, rng: random.Random) -> None:
    world.gate.kill(signal.SIGTERM)
    world.start_gate()


def loaded(world: World, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 5)):
        loader.load(world.gate.paths)


def reloaded(world: World, rng: random.Random) -> None:
    with policies_named_then_derived(world, rng):
        time.sleep(rng.uniform(0, 0.05))
    reload(world)


LIVES: list[Callable[[World, random.Random], None]] = [
    killed,
    killed_while_it_starts,
    ended,
    *[loaded] * 3,
    *[reloaded] * 4,
]
