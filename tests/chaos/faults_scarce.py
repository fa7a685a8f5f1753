"""What runs out, and comes back."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from ipsecgate.lab.connections import connection
from ipsecgate.lab.hosts import ConnSpec
from tests.chaos.fault import fault
from tests.chaos.faults_kernel import routes_of_others
from tests.chaos.faults_operator import GUEST, policies_named, policies_named_then_derived
from tests.chaos.scarce import few_descriptors, full, little_memory, read_only
from tests.chaos.tools import controller, either, is_stopped, reload, rewritten, vici, visit
from tests.chaos.world import SPECS, World

DISKS = (full, read_only)
LOOK = 0.3  # seconds: enough for the controller to hear of a connection


@fault(4, keeps=True)
def no_descriptors(world: World, rng: random.Random) -> Iterator[None]:
    """While everything that would need one happens, and somebody asks how it goes."""
    with few_descriptors(world, rng.choice([0, 0, 1, 3])):
        vici(either(world, rng), "rekey", child=rng.choice(SPECS).child_name)
        visit(world, world.gate.cgroup)
        with client(world), rewritten(world, policies_named), routes_of_others(world, rng):
            hang_up(world)
            yield
    hang_up(world)


@fault(3)
def no_descriptors_and_deleted(world: World, rng: random.Random) -> Iterator[None]:
    """What was covered has to be negotiated anew."""
    with few_descriptors(world, rng.choice([0, 0, 1, 3])):
        vici(world.lab.a, "terminate", ike=rng.choice(SPECS).name)
        yield


@fault(5, keeps=True)
def disk_full(world: World, rng: random.Random) -> Iterator[None]:
    """While there is more to be remembered."""
    with rng.choice(DISKS)(world.gate.paths.cache):
        more(world, rng)
        yield


@fault(3, keeps=True)
def disk_full_at_a_start(world: World, rng: random.Random) -> Iterator[None]:
    with rng.choice(DISKS)(world.gate.paths.cache):
        more(world, rng)
        # Whoever starts trusts no SA for which IKE does not vouch, and waits 5 s for its word.
        if not is_stopped(world.lab.a.charon.pid):
            world.gate.kill()
            world.start_gate()
        yield


@fault(4, keeps=True)
def memory_short(world: World, rng: random.Random) -> Iterator[None]:
    limit = rng.choice([0, 1 << 16, 1 << 18, 1 << 20])
    if not GUEST.exists():  # only its cgroups may be given another controller
        yield
        return
    with little_memory(world, limit):
        vici(either(world, rng), "rekey", child=rng.choice(SPECS).child_name)
        with policies_named_then_derived(world, rng):
            yield


@contextmanager
def client(world: World) -> Iterator[None]:
    """Have somebody wait at the control socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        with suppress(OSError):
            sock.connect(str(world.gate.paths.control))
        yield


def hang_up(world: World) -> None:
    """Have the configuration read by a signal: nobody waits for the end of it."""
    if pid := controller(world):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGHUP)


def more(world: World, rng: random.Random) -> None:
    """Have strongSwan load a connection to another network, and the gate hear of it."""
    network = f"192.0.2.{rng.randrange(128, 192)}/32"
    host, peer = world.lab.a, world.lab.b
    spec = ConnSpec("more", remote_ts=(network,))
    ends = host.end(spec, ()), peer.end(spec, spec.remote_ts)
    vici(host, "load_conn", **connection(spec, *ends, "none"))
    reload(world)  # it looks at once
    time.sleep(LOOK)
