"""The devices of a host beside its wire, random routes into them, and where the kernel sends.

A socket's packets leave through the device that the kernel's own connect() chose for it before
there was any policy. Each device has an MTU of its own, by which the socket tells the device.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_network
from random import Random

from ipsecgate.core.model.flow import Address, Network
from ipsecgate.lab.netns import Namespace
from tests.system.oracle.caller import DEVICE, IP_FREEBIND, SO_MARK
from tests.system.oracle.universe import FAR, LOCAL, NEAR, REMOTE
from tests.system.oracle.world import Route

IP_MTU, IPV6_MTU = 14, 24
MAIN, MARKED_TABLE, VRF_TABLE = 254, 77, 108
# The VRF's addresses. Its routes lead through the wire, which is not in the VRF: then the kernel
# prefers them to the source that the route names. The wire has them as well, so that ICMP errors to
# them arrive.
VRF = "red"
VRF_SOURCES = {family: LOCAL[family][3] for family in (4, 6)}
# Destinations with a preferred source; the others get the default of the route.
HINTS = (
    ("203.0.113.8/30", LOCAL[4][1]),
    ("203.0.113.14/31", LOCAL[4][2]),
    ("2001:db8:b::8/126", LOCAL[6][1]),
    ("2001:db8:b::e/127", LOCAL[6][2]),
)
# A mark, and the VRF, may lead to another source.
TABLES = {
    MARKED_TABLE: (("203.0.113.0/24", LOCAL[4][0]), ("2001:db8:b::/64", LOCAL[6][0])),
    VRF_TABLE: (("203.0.113.0/24", LOCAL[4][3]), ("2001:db8:b::/64", LOCAL[6][3])),
}
BITS_LEFT = (0, 0, 0, 1, 2, 3)
WORLDS = 4  # in a row with the same routes


@dataclass(frozen=True, slots=True)
class Tunnel:
    """A VTI with its ends and its key, or an XFRM interface with its id."""

    name: str
    kind: str
    mtu: int
    near: Address | None = None
    far: Address | None = None
    mark: int = 0
    if_id: int = 0

    @property
    def command(self) -> str:
        if self.kind == "xfrm":
            return f"link add {self.name} type xfrm dev {DEVICE} if_id {self.if_id}"
        ends = f"local {self.near} remote {self.far} key {self.mark}"
        return f"link add {self.name} type {self.kind} {ends}"


TUNNELS = (
    Tunnel("vti1", "vti", 1451, NEAR[4][0], FAR[4][0], mark=5),
    Tunnel("vti2", "vti", 1452, NEAR[4][0], FAR[4][1], mark=1),
    Tunnel("vti3", "vti6", 1453, NEAR[6][0], FAR[6][0], mark=5),
    Tunnel("xfrm1", "xfrm", 1454, if_id=7),
    Tunnel("xfrm2", "xfrm", 1455, if_id=9),
)


@dataclass(frozen=True, slots=True)
class Way:
    """How packets leave: the source of an unbound socket, and the device's name.

    `tunnel`: what that device is, if it looks up the SPD again. `translated`: the source that the
    host gives a container's packet.
    """

    source: Address
    device: str
    tunnel: Tunnel | None = None
    translated: Address | None = None


class Devices:
    """The tunnel devices and the VRF of a namespace, as far as the kernel has them."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._routes: tuple[Route, ...] = ()
        self._ways: dict[tuple[Address, int, str, Address | None], Way | None] = {}
        self.tunnels = tuple(one for one in TUNNELS if self._make(one.command))
        self.names = [DEVICE, *(one.name for one in self.tunnels)]
        if self._make(f"link add {VRF} type vrf table {VRF_TABLE}"):
            self.names.append(VRF)
        self._by_mtu = {one.mtu: one for one in self.tunnels}
        lines = []
        if VRF in self.names:
            lines = [f"link set {VRF} up", f"addr add {VRF_SOURCES[4]}/32 dev {VRF}"]
            lines.append(f"addr add {VRF_SOURCES[6]}/128 dev {VRF} nodad")
        for one in self.tunnels:
            lines.append(f"link set {one.name} addrgenmode none mtu {one.mtu} up")
        for table, hints in TABLES.items():
            lines += [f"route add {net} dev {DEVICE} src {src} table {table}" for net, src in hints]
        lines += [f"route add {network} dev {DEVICE} src {src}" for network, src in HINTS]
        self.ip(lines)

    def _make(self, command: str) -> bool:
        """Make a device; return whether the kernel has that kind."""
        argv = ["ip", "-n", self._namespace.name, *command.split()]
        return not subprocess.run(argv, check=False, capture_output=True).returncode

    def ip(self, lines: Iterable[str]) -> None:
        """Run commands of ip(8) in the namespace."""
        argv = ["ip", "-n", self._namespace.name, "-batch", "-"]
        subprocess.run(argv, input="\n".join(lines), text=True, check=True)

    def set_routes(self, routes: tuple[Route, ...]) -> bool:
        """Replace the routes of a world; return whether that changed anything."""
        if routes == self._routes:
            return False
        lines = [f"route del {one.network} table {one.table}" for one in self._routes]
        for one in routes:
            target = (
                f"{one.network} dev {one.device}" if one.device else f"unreachable {one.network}"
            )
            src = f" src {one.src}" if one.src else ""
            lines.append(f"route add {target}{src} table {one.table}")
        self.ip(lines)
        self._routes = routes
        self._ways.clear()
        return True

    def way(
        self, to: Address, mark: int = 0, device: str = "", source: Address | None = None
    ) -> Way | None:
        """Return how the kernel sends, None if it does not. Policies must not exist yet."""
        key = to, mark, device, source
        if key not in self._ways:
            self._ways[key] = self._ask(*key)
        return self._ways[key]

    def _ask(self, to: Address, mark: int, device: str, source: Address | None) -> Way | None:
        family = socket.AF_INET if to.version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
            if device:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
            if source:
                sock.setsockopt(socket.SOL_IP, IP_FREEBIND, 1)
                sock.bind((str(source), 0))
            try:
                sock.connect((str(to), 9))
            except OSError:
                return None
            source = type(to)(sock.getsockname()[0])
            level, option = (0, IP_MTU) if to.version == 4 else (socket.IPPROTO_IPV6, IPV6_MTU)
            tunnel = self._by_mtu.get(sock.getsockopt(level, option))
        return Way(source, tunnel.name if tunnel else DEVICE, tunnel)


def random_routes(seed: int, names: list[str]) -> tuple[Route, ...]:
    """Return the routes of a world: some of the remote networks lead elsewhere.

    `names`: the devices that there are.
    """
    dice = Random(seed // WORLDS)
    if dice.random() < 0.4:
        return ()
    tables = (MAIN, MAIN, MARKED_TABLE, VRF_TABLE) if VRF in names else (MAIN, MAIN, MARKED_TABLE)
    tunnels = [one.name for one in TUNNELS if one.name in names]
    taken = {(ip_network(network), MAIN) for network, _ in HINTS}
    found = []
    for _ in range(dice.randint(1, 5)):
        family = dice.choice((4, 4, 6))
        network = network_of(dice.choice(REMOTE[family]), dice.choice(BITS_LEFT))
        table = dice.choice(tables)
        device = dice.choice([*tunnels, *tunnels, DEVICE, ""])
        if (network, table) not in taken:
            taken.add((network, table))
            src = dice.choice(LOCAL[family]) if device else None
            found.append(Route(network, device, src, table))
    return tuple(found)


def network_of(address: Address, left: int) -> Network:
    return ip_network(f"{address}/{address.max_prefixlen - left}", strict=False)
