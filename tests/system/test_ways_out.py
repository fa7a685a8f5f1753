"""How the packets of another namespace leave, by the kernel, and how the namespace is found."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from ipsecgate.core.model.flow import Address, Network
from ipsecgate.core.model.namespace import WayOut
from ipsecgate.core.model.prefixes import LongestPrefix
from ipsecgate.edges.kernel import here as kernel_here
from ipsecgate.edges.kernel import namespaces, probe, ways_out
from ipsecgate.lab import netns, path
from ipsecgate.lab.charon import load_tun
from tests.system.boxes import BRIDGE, INSIDE, LINK, OUTSIDE, PORT, Box, box
from tests.until import wait_until

pytestmark = pytest.mark.second_guest

FAMILIES = (4, 6)
REMOTE = {4: "203.0.113.9", 6: "2001:db8:b::9"}
WIRE = {4: "192.0.2.2", 6: "2001:db8::2"}
NETWORKS: tuple[Network, ...] = (
    *map(ip_network, ("203.0.113.0/24", "10.0.0.0/8", "192.0.2.0/24", "198.18.0.0/15")),
    *map(ip_network, ("2001:db8::/32", "fd00::/8")),
)


@pytest.fixture
def host(unique: str) -> Iterator[netns.Namespace]:
    """A host with a device on the wire, and a default route; the other end is nobody."""
    made = netns.Namespace(f"{unique}-host")
    try:
        path.prepare(made)
        Box.ip("link add", made, "eth0 type veth peer wire")
        for device in ("lo", "eth0", "wire"):
            Box.ip("link set", made, device, "up")
        for family, address in {4: "192.0.2.1/24", 6: "2001:db8::1/64"}.items():
            Box.ip("address add", made, address, "dev eth0")
            Box.ip(f"-{family} route add", made, "default via", WIRE[family])
        yield made
    finally:
        made.remove()


def asked(host: netns.Namespace, there: Box) -> LongestPrefix[WayOut]:
    """Return the ways out of a box, as a gate in the host finds them."""

    async def ask() -> LongestPrefix[WayOut]:
        opened = namespaces.Namespace(os.open(there.namespace.path, os.O_RDONLY | os.O_CLOEXEC))
        try:
            here = await kernel_here.read_here(NETWORKS)
            return LongestPrefix(await ways_out.ways_out(opened, NETWORKS, here))
        finally:
            opened.close()

    result: list[LongestPrefix[WayOut]] = []

    def in_the_host() -> None:
        with host.inside():
            result.append(asyncio.run(ask()))

    thread = threading.Thread(target=in_the_host)
    thread.start()
    thread.join()
    return result[0]


def way(host: netns.Namespace, there: Box, to: str) -> WayOut:
    return next(asked(host, there).containing(ip_address(to)))[1]


def index(namespace: netns.Namespace, name: str) -> int:
    with namespace.inside():
        return int(Path(f"/proc/thread-self/net/dev_snmp6/{name}").read_text().split()[1])


def addressed(text: str) -> Address:
    return ip_address(text.split("/", maxsplit=1)[0])


@pytest.mark.parametrize("kind", ["bridge", "veth"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_veth_leads_through_the_host(host: netns.Namespace, kind: str, family: int) -> None:
    with box(host, kind) as there:
        found = way(host, there, REMOTE[family])
        assert found.source == addressed(INSIDE[family])
        assert found.link == index(host, "eth0")
        assert found.gateway == ip_address(WIRE[family])
        assert not found.reason


@pytest.mark.parametrize("family", FAMILIES)
def test_the_hosts_own_addresses_are_not_left(host: netns.Namespace, family: int) -> None:
    with box(host, "bridge") as there:
        for own in (
            addressed(OUTSIDE[family]),
            ip_address({4: "192.0.2.1", 6: "2001:db8::1"}[family]),
        ):
            assert way(host, there, str(own)) == WayOut(own)
        own = addressed(INSIDE[family])
        assert way(host, there, str(own)) == WayOut(own)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bridge_leads_around_the_host(host: netns.Namespace, family: int) -> None:
    """To a neighbour, and to a gateway that is not the host."""
    neighbour = {4: "10.88.0.9", 6: "fd88::9"}[family]
    with box(host, "bridge") as there:
        found = way(host, there, neighbour)
        assert found.source is None
        assert found.reason == "a bridge carries its packets there, around this host's SPD"
        Box.ip(f"-{family} route replace", there.namespace, "default via", neighbour)
        found = way(host, there, REMOTE[family])
        assert found.source is None
        assert neighbour in found.reason


def test_without_a_bridge_every_packet_comes_to_the_host(host: netns.Namespace) -> None:
    """Some networks give a container a gateway that nobody has, and the host answers for it."""
    with box(host, "veth") as there:
        Box.ip("route replace", there.namespace, "169.254.1.1 dev", LINK)
        Box.ip("route replace", there.namespace, "default via 169.254.1.1 dev", LINK)
        found = way(host, there, REMOTE[4])
        assert found.source == addressed(INSIDE[4])


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("macvlan", ""),
        ("macvlan", "private"),
        ("ipvlan", "l2"),
        ("ipvlan", "l3"),
        ("ipvlan", "l3s"),
    ],
)
def test_other_devices_lead_around_the_host(host: netns.Namespace, kind: str, mode: str) -> None:
    with box(host, kind, mode=mode) as there:
        found = way(host, there, REMOTE[4])
        assert found.source is None
        assert found.reason == (
            f"its packets leave by {kind} {LINK}, around this host's SPD: only an SPD in that "
            "namespace can protect it"
        )


def test_a_veth_into_a_third_namespace_leads_around_the_host(
    host: netns.Namespace, unique: str
) -> None:
    """Although it knows the host's namespace, and the host has a device of the peer's index."""
    third = netns.Namespace(f"{unique}-third")
    try:
        with box(third, "veth") as there:
            Box.ip("link add", host, "known type veth peer other netns", there.namespace.name)
            found = way(host, there, REMOTE[4])
            assert found.source is None
            assert "into another namespace than the gate's" in found.reason
    finally:
        third.remove()


def test_a_filter_on_the_way_may_lead_around_the_host(host: netns.Namespace) -> None:
    with box(host, "bridge") as there:
        for device in (PORT, BRIDGE):
            tc = ["tc", "-n", host.name, "qdisc"]
            subprocess.run([*tc, "add", "dev", device, "clsact"], check=True)
            found = way(host, there, REMOTE[4])
            assert found.source is None
            assert device in found.reason
            subprocess.run([*tc, "del", "dev", device, "clsact"], check=True)
            assert way(host, there, REMOTE[4]).source == addressed(INSIDE[4])


def test_a_gateway_with_a_link_local_address(host: netns.Namespace) -> None:
    with box(host, "bridge") as there:
        Box.ip("address add", host, "fe80::1/64 dev", BRIDGE)
        Box.ip("-6 route replace", there.namespace, "default via fe80::1 dev", LINK)
        assert way(host, there, REMOTE[6]).source == addressed(INSIDE[6])
        Box.ip("-6 route replace", there.namespace, "default via fe80::2 dev", LINK)
        assert way(host, there, REMOTE[6]).source is None


def test_a_host_that_does_not_forward(host: netns.Namespace) -> None:
    with box(host, "bridge") as there:
        host.sysctl("ipv4/ip_forward", "0")
        found = way(host, there, REMOTE[4])
        assert found == WayOut(
            None, reason=f"this host does not forward packets from {addressed(INSIDE[4])}"
        )


def test_the_hosts_reverse_path_filter_counts(host: netns.Namespace) -> None:
    with box(host, "bridge") as there:
        Box.ip("address add", there.namespace, "198.18.7.7/32 dev", LINK)
        Box.ip("route replace", there.namespace, "203.0.113.0/24 via 10.88.0.1 src 198.18.7.7")
        assert way(host, there, REMOTE[4]).source == ip_address("198.18.7.7")
        host.sysctl(f"ipv4/conf/{BRIDGE}/rp_filter", "1")
        found = way(host, there, REMOTE[4])
        assert found.source is None
        assert "198.18.7.7" in found.reason


def test_each_destination_has_its_own_way(host: netns.Namespace) -> None:
    with box(host, "bridge") as there:
        Box.ip("route add", there.namespace, "unreachable 203.0.113.64/26")
        Box.ip("route add", host, "unreachable 203.0.113.128/26")
        found = asked(host, there)

        def source(to: str) -> Address | None:
            return next(found.containing(ip_address(to)))[1].source

        assert source("203.0.113.9") == addressed(INSIDE[4])
        assert source("203.0.113.65") is None
        assert source("203.0.113.130") is None
        assert source("203.0.113.200") == addressed(INSIDE[4])
        assert not list(found.containing(ip_address("9.9.9.9"))), "nobody asked"


def test_userspace_esp_protects_only_what_is_routed_into_its_device(
    host: netns.Namespace,
) -> None:
    """The host's own packets go there; a rule for what arrives at the bridge leads past it."""
    load_tun()
    Box.ip("tuntap add", host, "ipsec0 mode tun")
    Box.ip("link set", host, "ipsec0 up")
    Box.ip("route add", host, "203.0.113.0/24 dev ipsec0")
    with box(host, "bridge") as there:
        assert way(host, there, REMOTE[4]).link == index(host, "ipsec0")
        Box.ip("route add", host, "203.0.113.0/24 via", WIRE[4], "table 100")
        Box.ip("rule add", host, "iif", BRIDGE, "lookup 100")
        found = way(host, there, REMOTE[4])
        assert found.source is None
        assert "by another device than ipsec0" in found.reason


# --- finding a namespace ------------------------------------------------------------------------


@pytest.fixture
def there(unique: str) -> Iterator[netns.Namespace]:
    made = netns.Namespace(f"{unique}-there")
    yield made
    made.remove()


def process_in(namespace: netns.Namespace) -> subprocess.Popen[bytes]:
    """Return a process whose main thread is in the namespace by now."""
    argv = ["nsenter", f"--net={namespace.path}", "sh", "-c", "echo; exec sleep 1000"]
    made = subprocess.Popen(argv, stdout=subprocess.PIPE)
    assert made.stdout
    made.stdout.readline()
    return made


def cookie_of(namespace: netns.Namespace) -> int:
    with namespace.inside():
        return probe.netns_cookie()


def test_a_namespace_is_found_by_a_process_in_it(there: netns.Namespace) -> None:
    process = process_in(there)
    try:
        found = namespaces.find(cookie_of(there), [os.getpid(), 2**22 - 1, process.pid])
        assert found is not None
        namespace, pid = found
        assert pid == process.pid
        assert namespace.cookie == cookie_of(there)
        assert namespace.run(probe.netns_cookie) == namespace.cookie
        assert probe.netns_cookie() != namespace.cookie, "this thread stays where it is"
        namespace.close()
        assert namespaces.find(cookie_of(there) + 1, [process.pid]) is None
    finally:
        process.kill()
        process.wait()


def test_a_namespace_is_found_by_a_thread_in_it(there: netns.Namespace) -> None:
    entered, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with there.inside():
            entered.set()
            leave.wait()

    thread = threading.Thread(target=stay)
    thread.start()
    entered.wait()
    try:
        found = namespaces.find(cookie_of(there), [os.getpid()])
        assert found is not None
        found[0].close()
    finally:
        leave.set()
        thread.join()

    def is_gone() -> bool:
        found = namespaces.find(cookie_of(there), [os.getpid()])
        if found is not None:
            found[0].close()
        return found is None

    wait_until(is_gone, "the thread is still found")  # the kernel ends it after join() returns


def test_an_open_namespace_lives_on(there: netns.Namespace) -> None:
    process = process_in(there)
    found = namespaces.find(cookie_of(there), [process.pid])
    process.kill()
    process.wait()
    assert found is not None
    assert found[0].run(probe.netns_cookie) == found[0].cookie
    found[0].close()


def test_a_failure_inside_is_passed_on(there: netns.Namespace) -> None:
    opened = namespaces.Namespace(os.open(there.path, os.O_RDONLY))

    def fail() -> None:
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        opened.run(fail)
    opened.close()
    with pytest.raises(OSError, match="setns"):
        namespaces.Namespace(os.open("/dev/null", os.O_RDONLY))
