"""The routes edge against the kernel: the source address that connect() really chooses."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import random
import socket
import subprocess
from collections.abc import AsyncIterator, Iterable, Iterator
from ipaddress import ip_address, ip_network

import pytest

from ipsecgate.core.model.events import OriginGone, PathsResolved, ServicesResolved
from ipsecgate.core.model.flow import HOST, Address, FlowPath, Network, Origin
from ipsecgate.core.model.nat import Ruleset
from ipsecgate.core.nat.translation import Nat
from ipsecgate.edges.kernel.routes import Found, Routes
from ipsecgate.lab.charon import load_tun
from ipsecgate.lab.netns import Namespace
from tests.system.event_recorder import batch, ip
from tests.until import until

pytestmark = [
    pytest.mark.second_guest,
    pytest.mark.skipif(os.geteuid() != 0, reason="missing: root"),
]

LINKS = [
    "link set lo up",
    "link add d0 type veth peer name d1",
    "link set d0 up",
    "link set d1 up",
    "address add 192.0.2.1/24 dev d0",
    "address add 192.0.2.9/24 dev d0",
    "address add 198.51.100.1/24 dev d1",
    "-6 address add 2001:db8::1/64 dev d0 nodad",
    "-6 address add 2001:db8::9/64 dev d0 nodad",
]


@pytest.fixture(autouse=True)
def _namespace(unique: str) -> Iterator[None]:
    space = Namespace(f"routes-{unique}")
    try:
        with space.inside():
            subprocess.run(["modprobe", "ipv6"], check=False, capture_output=True)
            for command in LINKS:
                ip(command)
            yield
    finally:
        space.remove()


def nets(*texts: str) -> tuple[Network, ...]:
    return tuple(ip_network(text) for text in texts)


def connected_source(destination: Address, device: str = "") -> Address | None:
    """Return the source that an application would get, None if connect() fails."""
    family = socket.AF_INET if destination.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        if device:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        try:
            sock.connect((str(destination), 9))
        except OSError:
            return None
        return ip_address(sock.getsockname()[0])


def lookup(paths: Iterable[tuple[Network, FlowPath]], address: Address) -> Address | None:
    found = [item for item in paths if address in item[0]]
    return max(found, key=lambda item: item[0].prefixlen)[1].source


@contextlib.asynccontextmanager
async def following(*destinations: str) -> AsyncIterator[asyncio.Queue[PathsResolved]]:
    resolutions: asyncio.Queue[PathsResolved] = asyncio.Queue()

    def deliver(event: Found) -> None:
        assert isinstance(event, PathsResolved)
        resolutions.put_nowait(event)

    routes = Routes(deliver)
    routes.follow(nets(*destinations))
    run = asyncio.create_task(routes.run())
    try:
        yield resolutions
    finally:
        run.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await run


async def after(resolutions: asyncio.Queue[PathsResolved], command: str) -> dict[str, str]:
    """Run ip(8) and return the sources that are reported then."""
    ip(command)
    resolved = await asyncio.wait_for(resolutions.get(), 60)
    return {str(net): str(path.source) for net, path in resolved.paths}


async def test_every_kind_of_route_change_is_reported() -> None:
    everything = "10.0.0.0/8"
    async with following(everything) as resolutions:
        first = await asyncio.wait_for(resolutions.get(), 60)
        assert first.paths == ((ip_network(everything), FlowPath(None)),)
        assert await after(resolutions, "route add default via 192.0.2.254") == {
            everything: "192.0.2.1"
        }
        # As strongSwan does: a table of its own with a preferred source.
        ip("rule add pref 220 table 220")
        assert await after(resolutions, "route add 10.2.0.0/16 dev d0 src 192.0.2.9 table 220") == {
            everything: "192.0.2.1",
            "10.2.0.0/16": "192.0.2.9",
        }
        assert await after(resolutions, "rule del pref 220 table 220") == {everything: "192.0.2.1"}
        ip("route add 0.0.0.0/0 dev d1 table 300")
        assert await after(resolutions, "rule add pref 300 to 10.3.0.0/16 table 300") == {
            everything: "192.0.2.1",
            "10.3.0.0/16": "198.51.100.1",
        }
        assert await after(resolutions, "route add unreachable 10.4.0.0/16") == {
            everything: "192.0.2.1",
            "10.3.0.0/16": "198.51.100.1",
            "10.4.0.0/16": "None",
        }
        assert (await after(resolutions, "address del 192.0.2.1/24 dev d0"))[
            everything
        ] != "192.0.2.1"
        assert "198.51.100.1" not in (await after(resolutions, "link set d1 down")).values()


async def test_routes_into_the_tunnel_of_an_ike_daemon_are_reported() -> None:
    load_tun()
    inside, beside = "10.2.0.0/16", "10.3.0.0/16"
    for name in ("ipsec7", "tun7"):
        ip(f"tuntap add {name} mode tun")
        ip(f"link set {name} up")
    ip("route add default dev d0")
    ip("rule add pref 220 table 220")
    add = f"route add {inside} dev ipsec7 src 192.0.2.9 table 220"
    async with following(inside, beside) as resolutions:

        async def into(command: str) -> dict[str, bool]:
            ip(command)
            resolved = await asyncio.wait_for(resolutions.get(), 60)
            await asyncio.sleep(0.1)  # nothing else is reported
            assert resolutions.empty()
            return {str(net): there for net, there in resolved.into_tun}

        assert (await asyncio.wait_for(resolutions.get(), 60)).into_tun == ()
        assert await into(add) == {inside: True, beside: False}
        other = "route add 10.2.7.0/24 dev tun7 src 192.0.2.1 table 220"
        assert await into(other) == {inside: True, "10.2.7.0/24": False, beside: False}
        for undo in ("route del 10.2.7.0/24 table 220", f"route del {inside} table 220"):
            ip(undo)
            first = await asyncio.wait_for(resolutions.get(), 60)
        # The first report still has the old source: the new route has not been looked up yet.
        assert dict(first.into_tun)[ip_network(inside)] is False
        assert str(lookup(first.paths, ip_address("10.2.0.1"))) == "192.0.2.9"
        last = await asyncio.wait_for(resolutions.get(), 60)
        assert last.into_tun == ()
        assert str(lookup(last.paths, ip_address("10.2.0.1"))) == "192.0.2.1"
        assert await into(add) == {inside: True, beside: False}
        ip("link set ipsec7 down")
        first = await asyncio.wait_for(resolutions.get(), 60)
        assert not any(there for _, there in first.into_tun)


async def test_changes_to_other_routes_are_not_reported() -> None:
    async with following("10.2.0.0/16") as resolutions:
        await asyncio.wait_for(resolutions.get(), 60)
        ip("route add 10.3.0.0/16 dev d0")
        ip("route add 10.2.0.0/24 dev d0")
        resolved = await asyncio.wait_for(resolutions.get(), 60)
        assert [str(net) for net, _ in resolved.paths] == ["10.2.0.0/16", "10.2.0.0/24"]
        await asyncio.sleep(0.2)
        assert resolutions.empty()


@pytest.mark.parametrize(
    ("destination", "sources"),
    [
        ("192.0.2.77", ["192.0.2.1"]),
        ("192.0.2.1", ["192.0.2.1"]),
        ("127.0.0.1", ["127.0.0.1"]),
        ("203.0.113.1", ["None"]),
        ("2001:db8::77", ["2001:db8::1", "2001:db8::9"]),
        ("::1", ["::1"]),
        ("2001:db8:ffff::1", ["None"]),
    ],
)
async def test_the_source_for_one_destination_is_that_of_connect(
    destination: str, sources: list[str]
) -> None:
    found = await Routes(lambda _: None).source_for(ip_address(destination))
    assert found == connected_source(ip_address(destination))
    assert str(found) in sources


def random_addresses(dice: random.Random) -> list[ipaddress.IPv6Interface]:
    """Return addresses between which an IPv6 socket's destination decides."""
    found = {}
    for _ in range(dice.randrange(8)):
        base, fixed = dice.choice(
            ((0x20010DB80002, 48), (0x20010DB80007, 48), (0xFD, 8), (0x2002, 16), (0x20010000, 32))
        )
        rest = dice.getrandbits(16) << 112 - fixed | dice.getrandbits(64) | 1
        address = ipaddress.IPv6Address(base << 128 - fixed | rest)
        found[address] = ipaddress.IPv6Interface((address, dice.choice((48, 64, 64, 128))))
    return list(found.values())


@pytest.mark.parametrize("seed", random.sample(range(2**32), 3))
async def test_resolved_sources_are_those_that_connect_chooses(seed: int) -> None:
    """Random routes, rules, addresses and destinations, compared with connect()."""
    dice = random.Random(seed)
    destinations = nets("10.0.0.0/8", "10.2.0.0/16", "2001:db8:2::/48", "0.0.0.0/0", "::/0")
    own = random_addresses(dice)
    batch([f"address add {one} dev {dice.choice(('d0', 'd1'))} nodad" for one in own])
    ways = [
        *("dev d0", "dev d1", "via 192.0.2.254", "dev d0 src 192.0.2.9", "via 198.51.100.9"),
    ]
    ways6 = ["dev d0", "via 2001:db8::ff", "dev d0 src 2001:db8::9"]
    for table in (220, 221):
        ip(f"rule add pref {table} table {table}")
        ip(f"-6 rule add pref {table} table {table}")
    ip("rule add pref 100 to 10.2.128.0/17 table 221")
    commands = []
    for _ in range(40):
        table = dice.choice([254, 220, 221])
        base = 10 << 24 | dice.choice([0, 2 << 16]) | dice.getrandbits(16)
        net = ipaddress.IPv4Network((base, dice.randrange(9, 30)), strict=False)
        kind = dice.choice(["", "", "", "", "unreachable", "blackhole", "prohibit", "throw"])
        way = "" if kind else dice.choice(ways)
        commands.append(f"route replace {kind} {net} {way} table {table}")
        six = ipaddress.IPv6Network(
            (0x20010DB80002 << 80 | dice.getrandbits(80), dice.randrange(48, 128)), strict=False
        )
        commands.append(f"route replace {six} {dice.choice(ways6)} table {table}")
    batch(commands)
    routes = Routes(lambda _: None)
    routes.follow(destinations)
    sources = await routes.resolve()
    assert len(sources) > 3
    edges = [net.network_address for net in await routes.prefixes()]
    edges += [net.broadcast_address for net in await routes.prefixes()]
    last = [ip_address("255.255.255.255"), ip_address(2**128 - 1)]
    inner = [address for address in edges if int(address) > 2**24 and address not in last]
    near = [address + step for address in inner for step in (-1, 0, 1)]
    somewhere: list[Address] = [ip_address(10 << 24 | dice.getrandbits(24)) for _ in range(500)]
    for one in own:  # as far from an address of ours as chance has it
        flips = [1 << dice.randrange(128) for _ in range(50)]
        somewhere += [ip_address(int(one.ip) ^ flip ^ dice.getrandbits(16)) for flip in flips]
    tried = 0
    for address in (*near, *somewhere):
        ours = any(address in net for net in destinations)
        special = address.is_multicast or address.is_reserved or address.is_link_local
        is_mapped = address.version == 6 and address.ipv4_mapped is not None  # that is IPv4
        if ours and not (special or is_mapped):
            assert lookup(sources, address) == connected_source(address), address
            tried += 1
    assert tried > 500


async def test_nothing_is_reported_before_destinations_are_known() -> None:
    """An empty report would delete the paths of a predecessor, which are in force."""
    reported: list[PathsResolved | OriginGone | ServicesResolved] = []
    routes = Routes(reported.append)
    run = asyncio.create_task(routes.run())
    routes.translate(Nat(Ruleset()))
    routes.follow_origin(Origin(mark=7))
    await asyncio.sleep(0.1)
    assert not reported
    routes.follow(nets("10.2.0.0/16"))

    def origins() -> set[Origin]:
        return {one.origin for one in reported if not isinstance(one, ServicesResolved)}

    await until(lambda: origins() == {HOST, Origin(mark=7)})
    run.cancel()


@pytest.mark.parametrize(
    ("own", "named", "resolved"),
    [
        (("2001:db8::9",), "2001:db8::9", "2001:db8::9"),
        (("2001:db8::9",), "2001:db8::1", None),
        (("2001:db8::9", "2001:db8::8"), "2001:db8::9", None),
    ],
)
async def test_a_route_out_of_a_vrf_gives_ipv6_sockets_no_uncertain_source(
    own: tuple[str, ...], named: str, resolved: str | None
) -> None:
    to = ip_address("2001:db8:b::1")
    for command in (
        "link add red type vrf table 108",
        "link set red up",
        *(f"-6 address add {one}/128 dev red nodad" for one in own),
        f"-6 route add 2001:db8:b::/64 via 2001:db8::2 dev d0 src {named} table 108",
    ):
        ip(command)
    red = Origin(device=socket.if_nametoindex("red"))
    found: asyncio.Queue[Found] = asyncio.Queue()
    routes = Routes(found.put_nowait)
    routes.follow(nets("2001:db8:b::/64"))
    routes.follow_origin(red)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(routes.run())
        event = await asyncio.wait_for(found.get(), 60)
        running.cancel()
    assert isinstance(event, PathsResolved)
    assert event.origin == red
    source = lookup(event.paths, to)
    assert source == (ip_address(resolved) if resolved else None)
    assert source in (None, connected_source(to, "red"))
