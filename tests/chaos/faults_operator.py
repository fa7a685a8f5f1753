"""What operators do, rightly or wrongly."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

from ipsecgate import loader
from tests.chaos.fault import fault
from tests.chaos.tools import (
    controller,
    reload,
    rewritten,
    vici,
    visit,
)
from tests.chaos.world import PROTECTED, SPECS, World

MORE = "192.0.2.200/32"
GUEST = Path("/run/host/command")  # only a guest's clock may be set

# --- what operators do ------------------------------------------------------------------------


@fault(6, keeps=True)
def cgroup_below_made_anew(world: World, rng: random.Random) -> Iterator[None]:
    below = world.gate.cgroup / "below"
    below.mkdir()
    visit(world, below)
    below.rmdir()
    yield


@fault(4, keeps=True)
def gated_cgroup_made_anew(world: World, rng: random.Random) -> Iterator[None]:
    """Its hooks go with it; who makes it again gates it before anybody is in it."""
    other = world.lab.cgroup("other")
    loader.attach(world.gate.paths, str(other))
    visit(world, other)
    other.rmdir()
    yield
    other.mkdir()
    loader.attach(world.gate.paths, str(other))
    visit(world, other)
    loader.detach(world.gate.paths, str(other))
    other.rmdir()


@fault(6, keeps=True)
def configuration_broken(world: World, rng: random.Random) -> Iterator[None]:
    with rewritten(world, lambda text: text.replace("[gate]", rng.choice(["[", "[gat]", ""]))):
        reload(world)
        yield
    reload(world)


@fault(6, keeps=True)
def policies_named_then_derived(world: World, rng: random.Random) -> Iterator[None]:
    """What must be protected stays so, whoever says it; one network more makes it another table."""
    policies = [
        f'[[policy]]\nname = "p{n}"\nremote = ["{net}"]' for n, net in enumerate([*PROTECTED, MORE])
    ]
    with rewritten(world, lambda text: "\n".join([text, *policies])):
        reload(world)
        yield
    reload(world)


@fault(4, keeps=True)
def named_cgroup_comes_and_goes(world: World, rng: random.Random) -> Iterator[None]:
    other = world.lab.cgroup("named")
    with rewritten(world, lambda text: text.replace("cgroups = [", f'cgroups = ["{other}", ')):
        reload(world)
        if controller(world):
            visit(world, other)
        yield
    reload(world)
    other.rmdir()


@fault(4, keeps=True)
def clock_jumped(world: World, rng: random.Random) -> Iterator[None]:
    """By less than a lifetime: the kernel ends SAs by the wall clock, too."""
    if not GUEST.exists():
        yield
        return
    seconds = rng.choice([-600, -60, 60, 600])
    time.clock_settime(time.CLOCK_REALTIME, time.clock_gettime(time.CLOCK_REALTIME) + seconds)
    vici(world.lab.a, "rekey", child=rng.choice(SPECS).child_name)
    yield
    time.clock_settime(time.CLOCK_REALTIME, time.clock_gettime(time.CLOCK_REALTIME) - seconds)
