"""Faults that exhaust a resource for a while: descriptors, disk, memory."""

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
from tests.chaos.fault_tools import controller, either, is_stopped, reload, rewritten, vici, visit
from tests.chaos.faults_kernel import unrelated_routes
from tests.chaos.faults_operator import GUEST, policies_configured_then_derived, with_policies
from tests.chaos.scarce import few_descriptors, full, little_memory, read_only
from tests.chaos.targets import SPECS
from tests.chaos.world import World

DISKS = (full, read_only)
NOTICE = 0.3  # seconds: enough for the controller to notice a connection


@fault(4, keeps=True)
def no_descriptors(world: World, rng: random.Random) -> Iterator[None]:
    """Meanwhile everything happens that would need one: a rekey, refusals, a client, a reload."""
    with few_descriptors(world, rng.choice([0, 0, 1, 3])):
        vici(either(world, rng), "rekey", child=rng.choice(SPECS).child_name)
        visit(world, world.gate.cgroup)
        with client(world), rewritten(world, with_policies), unrelated_routes(world, rng):
            send_sighup(world)
            yield
    send_sighup(world)


@fault(3)
def no_descriptors_and_deleted(world: World, rng: random.Random) -> Iterator[None]:
    """The deleted connection has to be negotiated again."""
    with few_descriptors(world, rng.choice([0, 0, 1, 3])):
        vici(world.lab.a, "terminate", ike=rng.choice(SPECS).name)
        yield


@fault(5, keeps=True)
def disk_full(world: World, rng: random.Random) -> Iterator[None]:
    """Meanwhile the controller has more to save."""
    with rng.choice(DISKS)(world.gate.paths.cache):
        load_another_connection(world, rng)
        yield


@fault(3, keeps=True)
def disk_full_at_a_start(world: World, rng: random.Random) -> Iterator[None]:
    with rng.choice(DISKS)(world.gate.paths.cache):
        load_another_connection(world, rng)
        # A new controller trusts only confirmed SAs, and waits 5 s for the IKE daemon to list them.
        if not is_stopped(world.lab.a.charon.pid):
            world.gate.kill()
            world.start_gate()
        yield


@fault(4, keeps=True)
def memory_short(world: World, rng: random.Random) -> Iterator[None]:
    limit = rng.choice([0, 1 << 16, 1 << 18, 1 << 20])
    if not GUEST.exists():  # the memory controller may only be enabled in a guest
        yield
        return
    with little_memory(world, limit):
        vici(either(world, rng), "rekey", child=rng.choice(SPECS).child_name)
        with policies_configured_then_derived(world, rng):
            yield


@contextmanager
def client(world: World) -> Iterator[None]:
    """Keep a client connected to the control socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)
        with suppress(OSError):
            sock.connect(str(world.gate.paths.control))
        yield


def send_sighup(world: World) -> None:
    """Request a reload by signal, which does not wait for it."""
    if pid := controller(world):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGHUP)


def load_another_connection(world: World, rng: random.Random) -> None:
    """Load a connection to another network into strongSwan, and let the gate notice it."""
    network = f"192.0.2.{rng.randrange(128, 192)}/32"
    host, peer = world.lab.a, world.lab.b
    spec = ConnSpec("more", remote_ts=(network,))
    ends = host.end(spec, ()), peer.end(spec, spec.remote_ts)
    vici(host, "load_conn", **connection(spec, *ends, "none"))
    reload(world)  # makes the gate read strongSwan's connections immediately
    time.sleep(NOTICE)
