"""Faults of the controller and of IKE."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress

from ipsecgate.admin import loader
from ipsecgate.lab.uml import children_of
from tests.chaos.fault import fault
from tests.chaos.fault_tools import (
    controller,
    either,
    overrun,
    suspended,
    suspended_controller,
    vici,
)
from tests.chaos.targets import SPECS
from tests.chaos.world import World

# --- the controller -----------------------------------------------------------------------


@fault(6, keeps=True)
def controller_killed(world: World, rng: random.Random) -> Iterator[None]:
    world.gate.kill()
    yield


@fault(2, keeps=True)
def controller_terminated(world: World, rng: random.Random) -> Iterator[None]:
    world.gate.kill(signal.SIGTERM)
    yield


@fault(10, keeps=True)
def controller_suspended(world: World, rng: random.Random) -> Iterator[None]:
    with suspended_controller(world):
        yield


@fault(4, keeps=True)
def notifications_overrun(world: World, rng: random.Random) -> Iterator[None]:
    overrun(world)
    yield


@fault(4)
def overrun_and_flushed(world: World, rng: random.Random) -> Iterator[None]:
    states = rng.random() < 0.5
    flush = world.lab.a.namespace.flush_xfrm
    overrun(world, lambda: flush(states=states, policies=not states))
    yield


@fault(4)
def overrun_and_deleted(world: World, rng: random.Random) -> Iterator[None]:
    spec = rng.choice(SPECS)
    overrun(world, lambda: vici(world.lab.a, "terminate", child=spec.child_name))
    yield


@fault(10, keeps=True)
def programs_loaded_again(world: World, rng: random.Random) -> Iterator[None]:
    loader.load(world.gate.paths)
    yield


@fault(4, keeps=True)
def inspector_killed(world: World, rng: random.Random) -> Iterator[None]:
    """Kill an inspector, or the process that starts them, and so all of them."""
    pid = controller(world)
    parents = children_of(pid) if pid else []
    inspectors = [each for parent in parents for each in children_of(parent)]
    for one in rng.choice([parents, inspectors]):
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    yield


# --- IKE ----------------------------------------------------------------------------------


@fault(3)
def charon_killed(world: World, rng: random.Random) -> Iterator[None]:
    world.lab.a.charon.kill()
    yield


@fault(2)
def charon_terminated(world: World, rng: random.Random) -> Iterator[None]:
    world.lab.a.charon.stop()
    yield


@fault(8, keeps=True)
def charon_suspended(world: World, rng: random.Random) -> Iterator[None]:
    with suspended(world.lab.a.charon.pid):
        yield


@fault(2)
def peer_killed(world: World, rng: random.Random) -> Iterator[None]:
    world.lab.b.charon.kill()
    world.lab.b.namespace.flush_xfrm(policies=False)
    yield


@fault(6, keeps=True)
def peer_suspended(world: World, rng: random.Random) -> Iterator[None]:
    with suspended(world.lab.b.charon.pid):
        yield


@fault(8)
def connection_unloaded(world: World, rng: random.Random) -> Iterator[None]:
    name = rng.choice(SPECS).name
    vici(world.lab.a, "unload_conn", name=name)
    vici(world.lab.a, "terminate", child=name)
    yield


@fault(10)
def child_deleted(world: World, rng: random.Random) -> Iterator[None]:
    vici(either(world, rng), "terminate", child=rng.choice(SPECS).child_name)
    yield


@fault(8)
def ike_deleted(world: World, rng: random.Random) -> Iterator[None]:
    vici(either(world, rng), "terminate", ike=rng.choice(SPECS).name)
    yield


@fault(12, keeps=True)
def child_rekeyed(world: World, rng: random.Random) -> Iterator[None]:
    vici(either(world, rng), "rekey", child=rng.choice(SPECS).child_name)
    yield


@fault(6, keeps=True)
def ike_rekeyed(world: World, rng: random.Random) -> Iterator[None]:
    vici(either(world, rng), "rekey", ike=rng.choice(SPECS).name)
    yield


@fault(6)
def reauthenticated(world: World, rng: random.Random) -> Iterator[None]:
    vici(either(world, rng), "rekey", ike=rng.choice(SPECS).name, reauth="yes")
    yield


@fault(2)
def ike_dropped(world: World, rng: random.Random) -> Iterator[None]:
    world.lab.drop_ike()
    vici(world.lab.a, "terminate", ike=rng.choice(SPECS).name, force="yes", timeout="-1")
    yield
    world.lab.drop_ike(False)


@fault(2)
def ike_dropped_for_long(world: World, rng: random.Random) -> Iterator[None]:
    """Long enough for strongSwan to give up and the gate to back off."""
    world.lab.drop_ike()
    vici(world.lab.a, "terminate", ike=rng.choice(SPECS).name, force="yes", timeout="-1")
    time.sleep(rng.uniform(2, 5))
    yield
    world.lab.drop_ike(False)
