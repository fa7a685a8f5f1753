"""Faults of the kernel's databases and of the network, and full maps."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import IPv6Network

from pyroute2 import NetlinkError

from ipsecgate.core.model.flow import HOST, FlowPath
from ipsecgate.core.tables.layout import ROUTES
from ipsecgate.core.tables.packed import pack_path, pack_route
from ipsecgate.lab.path import SITE_A, SITE_B
from tests.chaos.fault import fault
from tests.chaos.fault_tools import (
    delete,
    either,
    filled,
    port,
    route_of,
    storm_at_never,
    storm_of_states,
    vici,
)
from tests.chaos.targets import SPECS
from tests.chaos.world import World, ip

LOOPBACK = 1  # interface index
STRONGSWAN = 220  # routing table

# --- the kernel -----------------------------------------------------------------------------


@fault(8)
def states_flushed(world: World, rng: random.Random) -> Iterator[None]:
    world.lab.a.namespace.flush_xfrm(policies=False)
    yield


@fault(8)
def policies_flushed(world: World, rng: random.Random) -> Iterator[None]:
    world.lab.a.namespace.flush_xfrm(states=False)
    yield


@fault(4)
def everything_flushed(world: World, rng: random.Random) -> Iterator[None]:
    world.lab.a.namespace.flush_xfrm()
    yield


@fault(8)
def state_deleted(world: World, rng: random.Random) -> Iterator[None]:
    delete(world, rng, "state", outbound=True)
    yield


@fault(8)
def policy_deleted(world: World, rng: random.Random) -> Iterator[None]:
    delete(world, rng, "policy", outbound=True)
    yield


@fault(4)
def inbound_half_deleted(world: World, rng: random.Random) -> Iterator[None]:
    """Incoming packets are dropped until the gate has the child negotiated again."""
    delete(world, rng, rng.choice(["state", "policy"]), outbound=False)
    yield


@fault(3)
def peer_states_flushed(world: World, rng: random.Random) -> Iterator[None]:
    """The peer drops our ESP until `World.mend` terminates the IKE_SAs."""
    world.peer_lost_sas = True
    world.lab.b.namespace.flush_xfrm(policies=False)
    yield


@fault(6, keeps=True)
def unrelated_states(world: World, rng: random.Random) -> Iterator[None]:
    storm_of_states(world, 40)
    yield


# --- the network ----------------------------------------------------------------------------


@fault(6)
def peer_unplugged(world: World, rng: random.Random) -> Iterator[None]:
    port(world, SITE_B.port, "down")
    yield
    port(world, SITE_B.port, "up")


@fault(6)
def unplugged(world: World, rng: random.Random) -> Iterator[None]:
    port(world, SITE_A.port, "down")
    yield
    port(world, SITE_A.port, "up")


@fault(6)
def delayed_and_deleted(world: World, rng: random.Random) -> Iterator[None]:
    world.lab.set_delay(rng.randint(5, 60))
    vici(world.lab.a, "terminate", ike=rng.choice(SPECS).name, timeout="-1")
    yield
    world.lab.set_delay(0)


@fault(4, keeps=True)
def delayed_and_rekeyed(world: World, rng: random.Random) -> Iterator[None]:
    world.lab.set_delay(rng.randint(5, 60))
    vici(either(world, rng), "rekey", child=rng.choice(SPECS).child_name)
    yield
    world.lab.set_delay(0)


@fault(4)
def packets_lost(world: World, rng: random.Random) -> Iterator[None]:
    qdisc = ["tc", "-n", world.lab.path.name, "qdisc"]
    where = ["dev", rng.choice([SITE_A.port, SITE_B.port]), "root"]
    loss = ["netem", "loss", f"{rng.randint(10, 60)}%"]
    subprocess.run([*qdisc, "replace", *where, *loss], check=True, capture_output=True)
    vici(world.lab.a, "terminate", child=rng.choice(SPECS).child_name, timeout="-1")
    yield
    subprocess.run([*qdisc, "del", *where], check=False, capture_output=True)


@fault(6)
def address_removed(world: World, rng: random.Random) -> Iterator[None]:
    inner = {"address": str(world.lab.a.inner[4]), "prefixlen": 32}
    with suppress(NetlinkError):
        world.route.addr("del", index=LOOPBACK, **inner)
    yield
    with suppress(NetlinkError):
        world.route.addr("add", index=LOOPBACK, **inner)
    world.route.route("replace", **route_of(world))


@fault(6)
def route_removed(world: World, rng: random.Random) -> Iterator[None]:
    with suppress(NetlinkError):
        world.route.route("del", **route_of(world))
    world.route.flush_routes(table=STRONGSWAN)
    yield
    with suppress(NetlinkError):
        world.route.route("replace", **route_of(world))


@fault(4, keeps=True)
def unrelated_routes(world: World, rng: random.Random) -> Iterator[None]:
    gateway = str(world.lab.b.outer[4])
    for verb in ("add", "del"):
        for net in range(10):
            with suppress(NetlinkError):
                world.route.route(verb, dst=f"10.{net}.0.0/16", gateway=gateway)
    yield


# --- full maps ------------------------------------------------------------------------------


@fault(3, keeps=True)
def ring_and_recent_flooded(world: World, rng: random.Random) -> Iterator[None]:
    storm_at_never(world)
    yield


@fault(1)
def sources_full(world: World, rng: random.Random) -> Iterator[None]:
    first = int(IPv6Network("2001:db8:ffff::/48").network_address)
    keys = (pack_route(HOST, IPv6Network((first + n, 128))) for n in range(2 * ROUTES))
    with filled(world, "paths", keys, pack_path(FlowPath(None))):
        ip(world.lab.a, "route", "add", "203.0.113.128/25", "via", str(world.lab.b.outer[4]))
        yield
    ip(world.lab.a, "route", "del", "203.0.113.128/25")
