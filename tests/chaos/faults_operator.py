"""Actions of an operator, right and wrong ones."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from ipsecgate.admin import loader
from tests.chaos.fault import fault
from tests.chaos.fault_tools import (
    either,
    reload,
    rewritten,
    vici,
    visit,
)
from tests.chaos.targets import PROTECTED, SPECS
from tests.chaos.world import World

MORE = "192.0.2.200/32"
GUEST = Path("/run/host/command")  # exists only in a guest, whose clock and cgroups may be changed


@fault(6, keeps=True)
def cgroup_below_made_and_removed(world: World, rng: random.Random) -> Iterator[None]:
    below = world.gate.cgroup / "below"
    below.mkdir()
    visit(world, below)
    below.rmdir()
    yield


@fault(4, keeps=True)
def gated_cgroup_made_again(world: World, rng: random.Random) -> Iterator[None]:
    """Removing a cgroup removes its hooks, so attach them again before a process enters it."""
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
def policies_configured_then_derived(world: World, rng: random.Random) -> Iterator[None]:
    """The same networks stay protected; an additional one makes the tables differ."""
    with rewritten(world, with_policies):
        reload(world)
        yield
    reload(world)


def with_policies(text: str) -> str:
    """Return a configuration with policies, instead of those derived from strongSwan's."""
    policies = [
        f'[[policy]]\nname = "p{n}"\nremote = ["{net}"]' for n, net in enumerate([*PROTECTED, MORE])
    ]
    return "\n".join([text, *policies])


@fault(4, keeps=True)
def named_cgroup_comes_and_goes(world: World, rng: random.Random) -> Iterator[None]:
    other = world.lab.cgroup("named")
    with rewritten(world, lambda text: text.replace("cgroups = [", f'cgroups = ["{other}", ')):
        if reload(world):  # otherwise it is not gated
            visit(world, other)
        yield
    reload(world)
    other.rmdir()


@fault(4, keeps=True)
def clock_jumped(world: World, rng: random.Random) -> Iterator[None]:
    """By less than a lifetime, because the kernel also expires SAs by the wall clock."""
    if not GUEST.exists():
        yield
        return
    seconds = rng.choice([-600, -60, 60, 600])
    time.clock_settime(time.CLOCK_REALTIME, time.clock_gettime(time.CLOCK_REALTIME) + seconds)
    vici(world.lab.a, "rekey", child=rng.choice(SPECS).child_name)
    yield
    time.clock_settime(time.CLOCK_REALTIME, time.clock_gettime(time.CLOCK_REALTIME) - seconds)


@fault(4, keeps=True)
def floor_added_and_removed(world: World, rng: random.Random) -> Iterator[None]:
    with floor(world):
        yield
    reload(world)


@fault(3)
def floor_added_and_flushed(world: World, rng: random.Random) -> Iterator[None]:
    """The flush also removes the policies that take precedence over the floor."""
    with floor(world):
        world.lab.a.namespace.flush_xfrm(states=rng.random() < 0.5)
        yield
    reload(world)


@fault(4, keeps=True)
def live_flows_destroyed_and_rekeyed(world: World, rng: random.Random) -> Iterator[None]:
    """A rekey makes the new SA before it deletes the old one, so it must not end any flow."""
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
    """Reload with an extra line in [gate]; the end removes the line, but does not reload."""
    with rewritten(world, lambda text: text.replace("[gate]\n", f"[gate]\n{line}\n")):
        reload(world)
        yield


def floor(world: World) -> AbstractContextManager[None]:
    return gate_has(world, 'floor = "xfrm-block"')


def destroying(world: World) -> AbstractContextManager[None]:
    """Have flows without an SA destroyed, if the kernel can. The kernel of this suite cannot.

    Where it can, connections do not survive: see tests/qemu/test_destroy.py.
    """
    return gate_has(world, 'live_flows = "destroy"')
