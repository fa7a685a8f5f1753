"""A namespace behind the host, whose packets the host forwards, and translates in some worlds.

Which source a packet gets is seen on the wire, before there is any policy.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
from collections.abc import Iterator, Sequence
from ipaddress import ip_network
from pathlib import Path
from random import Random

from ipsecgate.core.model.flow import Address, FlowPath, Network, Origin
from ipsecgate.edges.kernel import namespaces, ways_out
from ipsecgate.edges.kernel.here import read_here
from ipsecgate.lab import path
from ipsecgate.lab.netns import Namespace
from tests.system.boxes import iptables
from tests.system.oracle.caller import DEVICE, Caller
from tests.system.oracle.capture import Capture
from tests.system.oracle.topology import WORLDS
from tests.system.oracle.universe import INSIDE, LOCAL, REMOTE
from tests.system.oracle.world import Nat

PORT = "port0"
GATEWAY = {4: "192.0.2.3", 6: "2001:db8::3"}
MAC_HERE, MAC_THERE = "02:00:00:00:00:01", "02:00:00:00:00:02"
NETLINK_NETFILTER = 12
CT_DELETE = 0x0102  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE; without a tuple: all
TCP_PORT = 9


class Container:
    """Such a namespace, with two callers. This process must be in the host's namespace."""

    def __init__(self, here: Namespace, there: Namespace, cgroup: Path, capture: Capture) -> None:
        self._there = there
        self._capture = capture
        self._nat: tuple[Nat, ...] = ()
        self._opened = namespaces.Namespace(os.open(there.path, os.O_RDONLY | os.O_CLOEXEC))
        self._translated: dict[Address, Address | None] = {}
        self.gated = Caller(here.path, cgroup, (there.path, PORT))
        self.free = Caller(here.path, None, (there.path, PORT))
        with there.inside():
            device = socket.if_nametoindex(DEVICE)
        cookie = self._opened.cookie
        self._origins = [Origin(cookie, index, mark) for index in (0, device) for mark in (0, 5)]
        self.can_translate = True
        try:
            self._programs = {family: iptables(family) for family in (4, 6)}
        except AssertionError:
            self.can_translate = False

    def close(self) -> None:
        for one in (self.gated, self.free, self._opened):
            one.close()

    def set_port(self, port: int) -> None:
        self._there.sysctl("ipv4/ip_local_port_range", f"{port} {port}")

    def set_nat(self, rules: tuple[Nat, ...]) -> bool:
        """Replace the rules; return whether that changed anything."""
        if rules == self._nat:
            return False
        for verb, those in (("-D", self._nat), ("-A", rules)):
            for rule in those:
                argv = [self._programs[rule.family], "-t", "nat", verb, "POSTROUTING"]
                subprocess.run([*argv, *str(rule).split()], check=True, capture_output=True)
        self._nat = rules
        return True

    def look(self) -> None:
        """See which sources packets get, in the absence of policies."""
        self.forget()
        everyone = [*REMOTE[4], *REMOTE[6]]
        self.free([["sendto", str(to), TCP_PORT, None, 0, False, 0, ""] for to in everyone])
        self._translated.clear()
        for to, packets in zip(everyone, self._capture.windows(len(everyone)), strict=True):
            if packets:
                source = packets[0].saddr
                self._translated[to] = None if source == INSIDE[to.version] else source

    def translated(self, to: Address) -> Address | None:
        """Return the source that a packet gets on the wire, None: its own."""
        return self._translated.get(to)

    def forget(self) -> None:
        """Empty the table of connections, which would keep an earlier world's translations."""
        if not self.can_translate:
            return
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER) as sock:
            sock.send(struct.pack("=IHHIIBBH", 20, CT_DELETE, 5, 1, 0, 0, 0, 0))
            code = -struct.unpack_from("=i", sock.recv(4096), 16)[0]
        assert not code, os.strerror(code)

    async def paths(
        self, destinations: Sequence[Network]
    ) -> list[tuple[Origin, tuple[tuple[Network, FlowPath], ...]]]:
        """Return the paths by origin, as the controller finds them."""
        here = await read_here(destinations)
        return [
            (
                origin,
                (await ways_out.paths(self._opened, origin, destinations, here, floor=False)).paths,
            )
            for origin in self._origins
        ]


def random_nat(seed: int) -> tuple[Nat, ...]:
    """Return the rules of a world."""
    dice = Random(f"nat {seed // WORLDS}")
    if dice.random() < 0.5:
        return ()
    unprotected = dice.random() < 0.25
    found = []
    for family in dice.choice(((4,), (6,), (4, 6))):
        to = dice.choice((None, None, *LOCAL[family]))
        left = dice.choice((None, None, 2, 1))
        network = None
        if left is not None:
            address = dice.choice(REMOTE[family])
            bits = address.max_prefixlen - left
            network = ip_network(f"{address}/{bits}", strict=False)
        found.append(Nat(INSIDE[family], network, to, unprotected))
    return tuple(found)


@contextlib.contextmanager
def container(name: str, here: Namespace, cgroup: Path, capture: Capture) -> Iterator[Container]:
    """Make a container of the host; the block runs in the host's namespace."""
    with contextlib.ExitStack() as stack:
        there = Namespace(name)
        stack.callback(there.remove)
        path.prepare(there)
        lines = [
            f"link add {PORT} address {MAC_HERE} type veth "
            f"peer name {DEVICE} address {MAC_THERE} netns {name}",
            f"link set {PORT} up",
        ]
        inside = ["link set lo up", f"link set {DEVICE} up"]
        for family, gateway in GATEWAY.items():
            bits = "nodad" if family == 6 else ""
            own, width = INSIDE[family], INSIDE[family].max_prefixlen
            lines += [
                f"addr add {gateway}/{width} dev {PORT} {bits}",
                f"route add {own} dev {PORT}",
            ]
            lines.append(f"neigh add {own} lladdr {MAC_THERE} dev {PORT} nud permanent")
            inside += [f"addr add {own}/{width} dev {DEVICE} {bits}"]
            inside += [f"route add {gateway} dev {DEVICE}"]
            inside.append(f"neigh add {gateway} lladdr {MAC_HERE} dev {DEVICE} nud permanent")
            everywhere = "::/0" if family == 6 else "default"
            inside.append(f"route add {everywhere} via {gateway}")
        for namespace, commands in ((here, lines), (there, inside)):
            argv = ["ip", "-n", namespace.name, "-batch", "-"]
            subprocess.run(argv, input="\n".join(commands), text=True, check=True)
        here.sysctl("ipv4/ip_forward", "1")
        here.sysctl("ipv6/conf/all/forwarding", "1")
        made = Container(here, there, cgroup, capture)
        stack.callback(made.close)
        yield made
