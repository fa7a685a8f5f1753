"""A cgroup with the hooks attached, a namespace whose only link leads nowhere, and callers.

The tables are written by hand; every refusal is a real system call's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from pathlib import Path

from ipsecgate.core.model.events import FlowRefused
from ipsecgate.core.model.flow import HOST, FlowPath
from ipsecgate.core.tables.layout import Entry, Reason, Setting, State, TableId
from ipsecgate.core.tables.packed import ports_setting
from ipsecgate.core.tables.table import Rule, compile_table, ternary
from ipsecgate.edges.bpf import bytecode
from ipsecgate.edges.bpf.datapath import Datapath
from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.edges.bpf.tables import Difference
from ipsecgate.edges.host import cgroups
from ipsecgate.edges.kernel.probe import netns_cookie
from ipsecgate.lab import path
from ipsecgate.lab.netns import Namespace
from tests.system.caller import Caller

HERE = {4: ip_address("198.51.100.1"), 6: ip_address("2001:db8:a::1")}
THERE = {4: ip_network("203.0.113.0/24"), 6: ip_network("2001:db8:b::/64")}
PEER = {4: "203.0.113.9", 6: "2001:db8:b::9"}
ELSEWHERE = {4: "198.51.100.77", 6: "2001:db8:a::77"}
OTHER = {4: "192.0.2.9", 6: "2001:db8:c::9"}
IKE_PORTS = (500, 4500)


@dataclass
class HookedCgroup:
    """A cgroup with the hooks attached, in a namespace whose only link leads nowhere."""

    cgroup: Path
    pins: Pins
    data: Datapath
    gated: Caller
    free: Caller
    namespace: Namespace
    link: int
    netns: int
    ike: socket.socket
    refusals: list[FlowRefused] = field(default_factory=list)
    before: Mapping[Reason, int] = field(default_factory=dict)

    def publish(self, table: TableId, *rules: Rule) -> None:
        async def publish() -> None:
            await self.data.publish(table, compile_table(rules))

        asyncio.run(publish())

    def change(self, table: TableId, changes: Iterable[Difference]) -> None:
        asyncio.run(self.data.change(table, changes))

    def take_over(self) -> None:
        """Have another controller take over from this one."""
        self.data.close()
        self.data = take_over(self.pins)

    def counted(self, reason: Reason) -> int:
        return self.data.counters()[reason] - self.before[reason]

    def renew(self) -> None:
        """Policies protect both networks, nothing covers them, counters are at zero.

        The way out counts as the IKE daemon's own device: the backstop has nothing to block.
        """
        for setting in (
            Setting.AUDIT,
            Setting.DENY,
            Setting.IKE,
            Setting.ERROR,
        ):
            self.data.set(setting, 0)
        self.data.set(Setting.NETNS, self.netns)
        no_backstop(self.data, self.link)
        self.data.set_paths(HOST, [(THERE[family], FlowPath(HERE[family])) for family in (4, 6)])
        self.publish(TableId.POLICY, *protect())
        self.publish(TableId.SPD)
        before = -1
        while before != len(self.refusals):  # a bounded number at a time
            before = len(self.refusals)
            self.data.drain()
        self.refusals.clear()
        self.before = self.data.counters()


def take_over(pins: Pins) -> Datapath:
    """Return the data path of a controller that begins."""
    data = Datapath(pins)
    asyncio.run(data.take_over())
    return data


@contextlib.contextmanager
def hooked_cgroup(
    name: str, cache: Path, bpffs: Path = Path("/sys/fs/bpf")
) -> Iterator[HookedCgroup]:
    """Make a hooked cgroup; the end of the block removes all of it."""
    with contextlib.ExitStack() as stack:
        namespace = Namespace(name)
        stack.callback(namespace.remove)
        path.prepare(namespace)
        for words in (
            "link set lo up",
            "link add out0 type veth peer name nowhere",
            "link set out0 arp off up",
            "link set nowhere up",
            f"addr add {HERE[4]}/32 dev out0",
            f"-6 addr add {HERE[6]}/128 dev out0 nodad",
            f"addr add {ELSEWHERE[4]}/32 dev out0",
            f"-6 addr add {ELSEWHERE[6]}/128 dev out0 nodad",
            "route add default dev out0",
            "-6 route add default dev out0",
        ):
            subprocess.run(["ip", "-n", name, *words.split()], check=True)
        namespace.sysctl("ipv4/ping_group_range", "0 0")
        cgroup = cgroups.root() / name
        cgroup.mkdir()
        stack.callback(cgroup.rmdir)
        pins = Pins(bpffs, name)
        stack.callback(pins.unload)
        pins.load(bytecode.get(cache))
        pins.attach(cgroup)
        data = take_over(pins)
        stack.callback(data.close)
        with namespace.route() as route:
            (link,) = route.link_lookup(ifname="out0")
        gated, free = Caller(namespace.path, cgroup), Caller(namespace.path, None)
        stack.callback(free.close)
        stack.callback(gated.close)
        with namespace.inside():
            netns = netns_cookie()
            ike = ike_socket()
        made = HookedCgroup(cgroup, pins, data, gated, free, namespace, link, netns, ike)
        stack.callback(lambda: made.ike.close())  # noqa: PLW0108  a test may replace it
        data.open_ring(made.refusals.append)
        yield made


def ike_socket(port: int = 500) -> socket.socket:
    """Return a UDP socket like the IKE daemon's, by which the backstop knows its namespace."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", port))
    return sock


def no_backstop(data: Datapath, link: int) -> None:
    """Make the backstop take a link for the IKE daemon's device, so that its packets pass.

    The daemon is known by this process's cgroup; `ike_socket` must be open in the link's namespace.
    """
    data.set_tunnels((link,))
    data.set(Setting.IKE_PORTS, ports_setting(IKE_PORTS))
    data.set(Setting.IKE_CGROUP, cgroups.of_process(os.getpid()).stat().st_ino)


def protect() -> list[Rule]:
    return [Rule(ternary(THERE[f]), Entry(State.PROTECT, id=f)) for f in (4, 6)]


def live() -> list[Rule]:
    return [Rule(ternary(THERE[f], src=ip_network(HERE[f])), Entry(State.LIVE)) for f in (4, 6)]


def went_out(told: str) -> bool:
    """Tell whether a call got past the hooks."""
    return told in ("", "EINPROGRESS")
