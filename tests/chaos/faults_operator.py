"""What operators do, rightly or wrongly."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ipsecgate.admin import loader
from tests.chaos.fault import fault
from tests.chaos.tools import (
    either,
    reload,
    rewritten,
    vici,
    visit,
)
from tests.chaos.world import PROTECTED, SPECS, World

MORE = "192.0.2.200/32"
GUEST = Path("/run/host/command")  # only a guest's own may be changed

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
    with rewritten(world, policies_named):
        reload(world)
        yield
    reload(world)


def policies_named(text: str) -> str:
    """Return a configuration with policies of its own."""
    policies = [
        f'[[policy]]\nname = "p{n}"\nremote = ["{net}"]' for n, net in enumerate([*PROTECTED, MORE])
    ]
    return "\n".join([text, *policies])


@fault(4, keeps=True)
def named_cgroup_comes_and_goes(world: World, rng: random.Random) -> Iterator[None]:
    other = world.lab.cgroup("named")
    with rewritten(world, lambda text: text.replace("cgroups = [", f'cgroups = ["{other}", ')):
        if reload(world):  # else nobody said that it is gated
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


@fault(4, keeps=True)
def floor_laid_and_taken_up(world: World, rng: random.Random) -> Iterator[None]:
    with floor(world):
        yield
    reload(world)


@fault(3)
def floor_laid_and_flushed(world: World, rng: random.Random) -> Iterator[None]:
    """With all that is above it."""
    with floor(world):
        world.lab.a.namespace.flush_xfrm(states=rng.random() < 0.5)
        yield
    reload(world)


@fault(4, keeps=True)
def live_flows_destroyed_and_rekeyed(world: World, rng: random.Random) -> Iterator[None]:
    """What is made before it is broken ends nothing."""
    with destroying(world):
        vici(either(world, rng), "rekey", child=rng.choice(SPECS).child_name)
        yield
    reload(world)


@fault(3)
def live_flows_destroyed_and_deleted(world: World, rng: random.Random) -> Iterator[None]:
    with destroying(world):
        vici(either(world, rng), "terminate", ike=rng.choice(SPECS).name)
        yield
    reload(world)


@contextmanager
def gate_has(world: World, line: str) -> Iterator[None]:
    """Reload with a line more in [gate]; without it, not yet read, at the end."""
    with rewritten(world, lambda text: text.replace("[gate]\n", f"[gate]\n{line}\n")):
        reload(world)
        yield


def floor(world: World) -> AbstractContextManager[None]:
    return gate_has(world, 'floor = "xfrm-block"')


def destroying(world: World) -> AbstractContextManager[None]:
    """Have what stands without an SA ended, on a kernel that can. This suite's cannot.

    Where it can, connections do not stand through it: tests/qemu/test_destroy.py.
    """
    return gate_has(world, 'live_flows = "destroy"')
