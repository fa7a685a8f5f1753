"""Random NAT rules and packets: what the kernel did with them, and what the evaluator says.

A host with two links and two addresses on one, a guest behind a third link, whose packets it
forwards, and a peer that captures all that leaves. What leaves is compared with the prediction.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, ip_address, ip_network
from random import Random

from ipsecgate.core.model.flow import UDP, Address
from ipsecgate.core.model.nat import AddressType, Device, Packet, Ruleset, Translation
from ipsecgate.core.nat.translation import Nat, moved
from ipsecgate.edges.kernel.nat import NatRules
from ipsecgate.lab.netns import Namespace
from tests.system import nat_random

SEED = int(os.environ.get("NAT_SEED", "1"))
CASES = int(os.environ.get("NAT_CASES", "6"))
FLOWS = 16
ETH_P_IP = 0x0800
SO_MARK = 36
WAIT = 5.0  # seconds for a packet to arrive
DESTINATIONS = ("10.2.0.9", "10.2.0.77", "10.3.0.7", "198.51.100.4")
SOURCES = ("10.0.0.1", "10.0.0.9", "10.1.0.1")
BEHIND = "172.17.0.2"
PORTS = (53, 80, 443, 8080, 30000)
LINKS = {"d0": ("10.0.0.1/24", "10.0.0.9/24"), "d1": ("10.1.0.1/24",), "d2": ("172.17.0.1/24",)}
FAR = ip_network("10.3.0.0/16")


@dataclass(frozen=True)
class Sent:
    """One datagram that is sent, and its number."""

    number: int
    saddr: str
    daddr: str
    dport: int
    mark: int

    @property
    def sport(self) -> int:
        return 10000 + self.number

    @property
    def is_local(self) -> bool:
        return self.saddr != BEHIND


@dataclass(frozen=True)
class Seen:
    """The datagram as it left."""

    saddr: Address
    daddr: Address
    dport: int


class World:
    """The namespaces, in which rules are replaced and datagrams sent."""

    def __init__(self, name: str) -> None:
        self.host = Namespace(f"{name}-host")
        self.peer = Namespace(f"{name}-peer")
        self.behind = Namespace(f"{name}-behind")
        self._numbers = 0
        for link, there in (("d0", self.peer), ("d1", self.peer), ("d2", self.behind)):
            self._ip(f"link add {link} type veth peer name {link} netns {there.name}")
        for link, addresses in LINKS.items():
            for address in addresses:
                self._ip(f"address add {address} dev {link}")
            there = self.behind if link == "d2" else self.peer
            for space in (self.host, there):
                run(space, f"ip link set {link} up")
            # Nobody answers ARP: the peer has no addresses.
            mac = run(there, f"cat /sys/class/net/{link}/address", shell=True).strip()
            gateway = addresses[0].replace(".1/24", ".2")
            self._ip(f"neighbour add {gateway} lladdr {mac} dev {link} nud permanent")
        self._ip("route add default via 10.0.0.2")
        self._ip(f"route add {FAR} via 10.1.0.2")
        self._ip("link set lo up")
        run(self.behind, f"ip address add {BEHIND}/24 dev d2")
        run(self.behind, "ip route add default via 172.17.0.1")
        self.host.sysctl("ipv4/ip_forward", "1")
        for link in ("all", *LINKS):
            self.host.sysctl(f"ipv4/conf/{link}/rp_filter", "0")
        with self.peer.inside():
            self._capture = socket.socket(
                socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETH_P_IP)
            )
        self._capture.settimeout(WAIT)

    def remove(self) -> None:
        self._capture.close()
        for space in (self.host, self.peer, self.behind):
            space.remove()

    def nft(self, text: str) -> None:
        run(self.host, "nft -f -", given=f"flush ruleset\n{text}")

    def has_fib(self) -> bool:
        """Return whether this kernel has nft_fib."""
        try:
            self.nft("table ip t { chain c { fib daddr type local } }")
        except AssertionError:
            return False
        return True

    def iptables(self, text: str, variant: str) -> None:
        """Replace the rules of iptables; `variant`: nft or legacy."""
        run(self.host, f"iptables-{variant}-restore", given=text)

    def flows(self, random: Random, count: int) -> list[Sent]:
        found = []
        for _ in range(count):
            self._numbers += 1
            saddr = BEHIND if random.random() < 0.4 else random.choice(SOURCES)
            mark = 0 if saddr == BEHIND else random.choice((0, 0, 1, 2, 5))
            sent = Sent(
                self._numbers, saddr, random.choice(DESTINATIONS), random.choice(PORTS), mark
            )
            found.append(sent)
        return found

    def send(self, flows: list[Sent]) -> dict[Sent, Seen]:
        """Send datagrams, and return what left; one that did not leave was dropped."""
        for sent in flows:
            with (self.host if sent.is_local else self.behind).inside():
                one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            with one:
                one.setsockopt(socket.SOL_SOCKET, SO_MARK, sent.mark)
                one.bind((sent.saddr, sent.sport))
                with contextlib.suppress(PermissionError):
                    one.sendto(struct.pack("=I", sent.number), (sent.daddr, sent.dport))
        return self._collect(flows)

    def _collect(self, flows: list[Sent]) -> dict[Sent, Seen]:
        # A datagram that no rule concerns, last, says that all others have arrived.
        self._numbers += 1
        last = self._numbers
        with self.host.inside(), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as one:
            one.bind(("d0", 0))
            header = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 32, 0, 0, 64, UDP, 0, bytes(4), bytes(4))
            frame = b"\0" * 12 + struct.pack(">H", ETH_P_IP) + header
            one.send(frame + struct.pack(">HHHH", 1, 1, 12, 0) + struct.pack("=I", last))
        by_number = {sent.number: sent for sent in flows}
        found: dict[Sent, Seen] = {}
        while True:
            data = self._capture.recv(2048)
            if len(data) < 32 or data[9] != UDP:
                continue
            (number,) = struct.unpack_from("=I", data, 28)
            if number == last:
                return found
            if number in by_number:
                (dport,) = struct.unpack_from(">H", data, 22)
                seen = Seen(IPv4Address(data[12:16]), IPv4Address(data[16:20]), dport)
                found[by_number[number]] = seen

    def read(self) -> Ruleset:
        async def read() -> Ruleset:
            async with NatRules() as rules:
                return await rules.read()

        with self.host.inside():
            return asyncio.run(read())

    def device(self, name: str) -> Device:
        index = run(self.host, f"cat /sys/class/net/{name}/ifindex", shell=True)
        return Device(int(index), name, 0)

    def _ip(self, command: str) -> None:
        run(self.host, f"ip {command}")


def run(space: Namespace, command: str, given: str | None = None, shell: bool = False) -> str:
    prefix = ["ip", "netns", "exec", space.name] if shell else []
    with space.inside() if not shell else contextlib.nullcontext():
        done = subprocess.run(
            [*prefix, *command.split()], input=given, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, f"{command}: {done.stderr}\n{given}"
    return done.stdout


def route(daddr: Address, devices: dict[str, Device]) -> tuple[Device, Address]:
    """Return the device and the address for MASQUERADE, as the world's routes give them."""
    name = "d1" if daddr in FAR else "d0"
    for link, addresses in LINKS.items():
        if any(daddr in ip_network(one, strict=False) for one in addresses):
            name = link
    return devices[name], ip_address(LINKS[name][0].split("/")[0])


def predict(
    nat: Nat, sent: Sent, devices: dict[str, Device]
) -> Iterator[tuple[Translation, Translation]] | None:
    """Return the possible pairs of destination and source; None: anything."""
    daddr = ip_address(sent.daddr)
    oif, masquerade = route(daddr, devices)
    packet = Packet(
        daddr, UDP, ip_address(sent.saddr), sent.sport, sent.dport, None, sent.is_local,
        None if sent.is_local else devices["d2"], oif if sent.is_local else None, sent.mark, False,
        AddressType.LOCAL if sent.is_local else AddressType.UNICAST, AddressType.UNICAST,
        masquerade,
    )  # fmt: skip
    found = []
    destinations = nat.destinations(packet)
    if destinations is None:
        return None
    for destination in destinations:
        if destination.low.is_loopback or destination.low != destination.high:
            return None
        then = moved(packet, destination)
        oif, masquerade = route(then.daddr, devices)
        sources = nat.sources(replace(then, oif=oif, masquerade=masquerade))
        if sources is None:
            return None
        found += [(destination, source) for source in sources]
    return iter(found)


def predict_widely(nat: Nat, sent: Sent, devices: dict[str, Device]) -> set[Translation] | None:
    """Return what the source may become if only the network of the destination is known."""
    daddr = ip_address(sent.daddr)
    oif, masquerade = route(daddr, devices)
    iif = None if sent.is_local else devices["d2"]
    packet = Packet(
        daddr, saddr=ip_address(sent.saddr), bits=19, local=sent.is_local, iif=iif, oif=oif,
        mark=None, masquerade=masquerade,
    )  # fmt: skip
    found = nat.sources(packet)
    return None if found is None else set(found)


def agrees(seen: Seen, destination: Translation, source: Translation) -> bool:
    low, high = destination.ports
    return (
        source.low <= seen.saddr <= source.high  # type: ignore[operator]
        and destination.low == seen.daddr
        and low <= seen.dport <= high
    )


def leaves_as_predicted(world: World, kind: str, *, unclear: bool) -> None:
    """Compare random rules of a kind: nft, iptables-nft or iptables-legacy."""
    has_fib = kind == "nft" and world.has_fib()
    left = clear = exact = 0
    for seed in range(SEED * 1000, SEED * 1000 + CASES):
        random = Random(f"{seed}{kind}")
        if kind == "nft":
            text = nat_random.nft(random, unclear=unclear, fib=has_fib)
            world.nft(text)
        else:
            text = nat_random.iptables(random, unclear=unclear)
            world.iptables(text, kind.removeprefix("iptables-"))
        count, found = compare(world, random, f"seed {seed}\n{text}")
        left += count
        if not (unclear or nat_random.sets_marks_elsewhere(text)):
            clear, exact = clear + FLOWS, exact + found
    assert left > CASES * FLOWS // 2
    assert exact >= clear * 0.95
    assert clear or unclear


def compare(world: World, random: Random, text: str) -> tuple[int, int]:
    """Send flows; return how many left, and of how many there was one prediction or none."""
    devices = {name: world.device(name) for name in LINKS}
    nat = Nat(world.read())
    flows = world.flows(random, FLOWS)
    seen = world.send(flows)
    exact = 0
    for sent in flows:
        predicted = predict(nat, sent, devices)
        if predicted is None:
            continue
        possible = list(predicted)
        exact += len(possible) <= 1
        problem = f"{sent}: {seen.get(sent)}, predicted {possible}, rules:\n{text}"
        if sent in seen:
            assert any(agrees(seen[sent], *one) for one in possible), problem
            wide = predict_widely(nat, sent, devices)
            if wide is not None and str(seen[sent].daddr) == sent.daddr:
                assert any(one.low <= seen[sent].saddr <= one.high for one in wide), problem  # type: ignore[operator]
    return len(seen), exact
