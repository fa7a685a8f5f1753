"""The setting of a world: two namespaces, a veth between them, a cgroup with the hooks.

    <name>-a   the host: addresses, routes, XFRM, both callers;  eth0 has no neighbours to ask
    <name>-b   the far end: it has no address and answers nothing; the capture is there

The rest of the process runs inside a; only sockets made inside b belong to b.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from ipaddress import ip_network
from pathlib import Path

from ipsecgate.core.model.events import KernelSnapshot, PolicySet, SaSet
from ipsecgate.core.model.flow import ANY_V4, ANY_V6, HOST, Address
from ipsecgate.core.state.kernel_state import KernelState
from ipsecgate.core.tables.layout import Entry, Reason, Setting, State, TableId
from ipsecgate.core.tables.table import Rule, Table, compile_table, ternary
from ipsecgate.edges.bpf import bytecode
from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.edges.host import cgroups
from ipsecgate.edges.kernel.probe import netns_cookie
from ipsecgate.edges.kernel.routes import Routes
from ipsecgate.edges.kernel.xfrm import XfrmMonitor
from ipsecgate.lab import path
from ipsecgate.lab.netns import Namespace
from tests.reference_rules import kernel_rules
from tests.system.hooked_cgroup import ike_socket, no_backstop, take_over
from tests.system.oracle.caller import DEVICE, SO_MARK, Caller
from tests.system.oracle.capture import Capture
from tests.system.oracle.generate import CALL_MARKS, FAR, LOCAL, NEAR, REMOTE
from tests.system.oracle.wire import Installer

FAR_END = "eth1"
# Nothing else returns this errno, so it distinguishes the gate from XFRM.
REFUSAL = errno.EBADE
PROTECTED = (ip_network("203.0.113.8/29"), ip_network("2001:db8:b::8/125"))
# Destinations with a preferred source; the others get the default of the route.
HINTS = (
    ("203.0.113.8/30", LOCAL[4][1]),
    ("203.0.113.14/31", LOCAL[4][2]),
    ("2001:db8:b::8/126", LOCAL[6][1]),
    ("2001:db8:b::e/127", LOCAL[6][2]),
)


# A mark may lead to another source.
MARKED_TABLE = 77
MARKED_HINTS = (("203.0.113.0/24", LOCAL[4][0]), ("2001:db8:b::/64", LOCAL[6][0]))


class TwoNamespaces:
    """The two namespaces. Use `two_namespaces()`, which also enters the first."""

    def __init__(self, near: Namespace, cgroup: Path, pins: Pins, far: Namespace) -> None:
        self.pins = pins
        self.data = take_over(pins)
        self.installer = Installer()
        self.capture = Capture(far, FAR_END)
        self.gated = Caller(near.path, cgroup)
        self.free = Caller(near.path, None)
        self.device = socket.if_nametoindex(DEVICE)
        self.monitor = XfrmMonitor(lambda _event: None)
        self.distort: Callable[[KernelSnapshot], KernelSnapshot] = lambda true: true
        everywhere = [one for pool in (REMOTE, FAR) for one in (*pool[4], *pool[6])]
        self._sources = {
            (one, mark): kernel_source(one, mark) for one in everywhere for mark in CALL_MARKS
        }

    def close(self) -> None:
        for one in (self.gated, self.free, self.capture, self.installer, self.data):
            one.close()

    def source_for(self, destination: Address, mark: int = 0) -> Address:
        """Return the source that the kernel chose before there was any policy."""
        return self._sources[destination, mark]

    def set_port(self, port: int) -> None:
        """Leave the kernel one source port to choose."""
        Path("/proc/sys/net/ipv4/ip_local_port_range").write_text(f"{port} {port}")

    async def prepare(self) -> None:
        """Protect everything; resolve the sources as the controller does."""
        routes = Routes(lambda _resolved: None)
        routes.follow(PROTECTED)
        self.data.set_paths(HOST, await routes.resolve())
        everything = [
            Rule(ternary(n), Entry(State.PROTECT, error=REFUSAL)) for n in (ANY_V4, ANY_V6)
        ]
        self.data.set(Setting.ERROR, REFUSAL)
        self.data.set(Setting.NETNS, netns_cookie())
        no_backstop(self.data, self.device)  # the hooks alone
        await self.data.publish(TableId.POLICY, compile_table(everything))

    async def table(self) -> Table:
        """Return the gate's view of the SPD and SAD as they are. Raises: LayoutError.

        Every SA counts as confirmed: the test is about XFRM, not about the IKE daemon.
        """
        snapshot = self.distort(await self.monitor.snapshot())
        kernel_state = KernelState()
        kernel_state.ike_connected(())
        for entry in snapshot.policies:
            kernel_state.apply(PolicySet(entry))
        for sa in snapshot.sas:
            kernel_state.apply(SaSet(sa))
        return compile_table(kernel_rules(kernel_state))

    def counted(self) -> tuple[int, int]:
        """Return how many covered calls the hooks have let through, and how many refused."""
        counters = self.data.counters()
        covered = counters[Reason.ALLOW_COVERED] + counters[Reason.ALLOW_ASSOCIATED]
        return covered, counters[Reason.REFUSE_UNCOVERED] + counters[Reason.REFUSE_NO_SOURCE]


def kernel_source(destination: Address, mark: int) -> Address:
    family = socket.AF_INET if destination.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
        sock.connect((str(destination), 9))
        return type(destination)(sock.getsockname()[0])


def furnish(name: str, near: Namespace, far: Namespace) -> None:
    """Connect the namespaces; set up addresses and routes of the near one."""
    for one in (near, far):
        path.prepare(one)
    far.sysctl("ipv6/conf/default/disable_ipv6", "1")
    lines = [f"link add {DEVICE} type veth peer name {FAR_END} netns {far.name}"]
    lines += ["link set lo up", f"link set {DEVICE} up arp off"]
    addresses = [one for pool in (LOCAL, NEAR) for one in (*pool[4], *pool[6])]
    for address in addresses:
        at_once = " nodad" if address.version == 6 else ""
        lines.append(f"addr add {address}/{address.max_prefixlen} dev {DEVICE}{at_once}")
    lines += [f"route add default dev {DEVICE}", f"route add ::/0 dev {DEVICE}"]
    lines += [f"route add {network} dev {DEVICE} src {src}" for network, src in HINTS]
    for network, src in MARKED_HINTS:
        lines.append(f"route add {network} dev {DEVICE} src {src} table {MARKED_TABLE}")
    rules = [f"-{family} rule add fwmark 5/0xff table {MARKED_TABLE}" for family in (4, 6)]
    for rule in rules:  # a batch has one family
        subprocess.run(["ip", "-n", near.name, *rule.split()], check=True)
    for namespace, commands in ((near, lines), (far, [f"link set {FAR_END} up"])):
        subprocess.run(
            ["ip", "-n", namespace.name, "-batch", "-"],
            input="\n".join(commands),
            text=True,
            check=True,
        )


@contextlib.contextmanager
def two_namespaces(cache: Path, name: str | None = None) -> Iterator[TwoNamespaces]:
    """Make the namespaces, with the hooks from `cache`; the block runs in the first of them."""
    name = f"{name or 'oracle'}-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        near, far = Namespace(f"{name}-a"), None
        stack.callback(near.remove)
        far = Namespace(f"{name}-b")
        stack.callback(far.remove)
        furnish(name, near, far)
        cgroup = cgroups.root() / name
        cgroup.mkdir()
        stack.callback(cgroup.rmdir)
        pins = Pins(Path("/sys/fs/bpf"), name)
        stack.callback(pins.unload)
        pins.load(bytecode.get(cache))
        pins.attach(cgroup)
        stack.enter_context(near.inside())
        stack.enter_context(ike_socket())
        made = TwoNamespaces(near, cgroup, pins, far)
        stack.callback(made.close)
        yield made
