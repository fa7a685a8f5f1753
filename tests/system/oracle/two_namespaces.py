"""The setting of a world: two namespaces, a veth between them, a cgroup with the hooks.

    <name>-a   the host: addresses, routes, XFRM, both callers;  eth0 has no neighbours to ask
    <name>-b   the far end: it has no address and answers nothing; the capture is there
    <name>-c   a container: a forwards its packets

The rest of the process runs inside a; only sockets made inside b belong to b.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.routing import Routing
from ipsecgate.core.model.events import (
    KernelSnapshot,
    PathsResolved,
    PolicySet,
    SaSet,
)
from ipsecgate.core.model.flow import ANY_V4, ANY_V6, HOST, Address, FlowPath, Network, Origin
from ipsecgate.core.state.kernel_state import KernelState
from ipsecgate.core.tables.layout import Entry, Reason, Setting, State, TableId
from ipsecgate.core.tables.table import Rule, Table, compile_table, ternary
from ipsecgate.edges.bpf import bytecode
from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.edges.host import cgroups
from ipsecgate.edges.kernel.probe import netns_cookie
from ipsecgate.edges.kernel.routes import Found, Routes
from ipsecgate.edges.kernel.xfrm import XfrmMonitor
from ipsecgate.lab import path
from ipsecgate.lab.netns import Namespace
from tests.reference_rules import kernel_rules
from tests.system.hooked_cgroup import ike_socket, no_backstop, take_over
from tests.system.oracle.caller import DEVICE, Caller
from tests.system.oracle.capture import Capture
from tests.system.oracle.container import Container, container
from tests.system.oracle.generate import CALL_MARKS
from tests.system.oracle.topology import MARKED_TABLE, Devices, Way
from tests.system.oracle.universe import FAR, INSIDE, LOCAL, NEAR
from tests.system.oracle.wire import Installer
from tests.system.oracle.world import Call, World

FAR_END = "eth1"
# Nothing else returns this errno, so it distinguishes the gate from XFRM.
REFUSAL = errno.EBADE
COUNTED = (
    (Reason.ALLOW_COVERED, Reason.ALLOW_ASSOCIATED, Reason.ALLOW_PASSED),
    (Reason.REFUSE_UNCOVERED, Reason.REFUSE_NO_SOURCE, Reason.REFUSE_OUTSIDE),
)
PROTECTED = (ip_network("203.0.113.8/29"), ip_network("2001:db8:b::8/125"))


class TwoNamespaces:
    """The two namespaces. Use `two_namespaces()`, which also enters the first."""

    def __init__(
        self, near: Namespace, cgroup: Path, pins: Pins, capture: Capture, devices: Devices
    ) -> None:
        self.pins = pins
        self.devices = devices
        self.capture = capture
        self.data = take_over(pins)
        self.installer = Installer()
        self.gated = Caller(near.path, cgroup)
        self.free = Caller(near.path, None)
        self.device = socket.if_nametoindex(DEVICE)
        self.monitor = XfrmMonitor(lambda _event: None)
        self.distort: Callable[[KernelSnapshot], KernelSnapshot] = lambda true: true
        self.distort_path: Callable[[FlowPath], FlowPath] = lambda true: true
        self.exceptions_count: Callable[[World], bool] = lambda world: world.derived
        self._origins = [
            Origin(0, socket.if_nametoindex(name) if name else 0, mark)
            for name in ("", *devices.names)
            for mark in CALL_MARKS
        ]
        self._followed = False
        self._derived: bool | None = None

    container: Container

    def close(self) -> None:
        for one in (self.gated, self.free, self.installer, self.data):
            one.close()

    def index_of(self, device: str) -> int:
        """Return the interface index of a device, 0 for none."""
        return socket.if_nametoindex(device) if device else 0

    def source_for(self, destination: Address) -> Address:
        """Return the source of the kernel's own packets, such as those of a tunnel."""
        way = self.devices.way(destination)
        assert way is not None
        return way.source

    def way(self, call: Call) -> Way | None:
        """Return how the kernel sends a call, None if it does not."""
        if not call.inside:
            return self.devices.way(call.dst, call.mark, call.device, call.src)
        way = self.devices.way(call.dst)
        if way is None:
            return None
        own = INSIDE[call.dst.version]
        return replace(way, source=own, translated=self.container.translated(call.dst))

    def set_port(self, port: int) -> None:
        """Leave the kernel one source port to choose."""
        self.container.set_port(port)
        Path("/proc/sys/net/ipv4/ip_local_port_range").write_text(f"{port} {port}")

    async def prepare(self) -> None:
        """Set up the hooks alone, without the backstop."""
        self._followed, self._derived = False, None
        self.data.set(Setting.ERROR, REFUSAL)
        self.data.set(Setting.NETNS, netns_cookie())
        no_backstop(self.data, self.device)

    async def begin(self, world: World) -> None:
        """Set up all of a world but its SPD and SAD, which are emptied. Protect everything."""
        self.installer.flush()
        changed = self.devices.set_routes(world.routes)
        if self.container.set_nat(world.nat) or changed or not self._followed:
            self.container.look()
            await self._follow()
            self._followed = True
        for far in (*FAR[4], *FAR[6]):
            self.devices.way(far)
        for call in world.calls:
            self.way(call)
        derived = self.exceptions_count(world)
        if derived != self._derived:
            state = State.DERIVED if derived else State.PROTECT
            everything = [Rule(ternary(n), Entry(state, error=REFUSAL)) for n in (ANY_V4, ANY_V6)]
            await self.data.publish(TableId.POLICY, compile_table(everything))
            self._derived = derived

    async def _follow(self) -> None:
        """Resolve the paths as the controller does, and pass them to the hooks."""
        resolved: asyncio.Queue[Found] = asyncio.Queue()
        routes = Routes(resolved.put_nowait)
        routes.follow(PROTECTED)
        for origin in self._origins:
            routes.follow_origin(origin)
        running = asyncio.create_task(routes.run())
        routing = Routing()
        routing.follow(PROTECTED)
        try:
            event = await self._pass_on(routing, resolved)
            while event.origin != HOST:  # which comes last
                event = await self._pass_on(routing, resolved)
        finally:
            running.cancel()
        for origin, paths in await self.container.paths(PROTECTED):
            self._set_paths(origin, paths)
        self.data.set(Setting.PATHS, routing.bound_too)
        self.data.set_tunnels((self.device, *event.tunnels))

    async def _pass_on(self, routing: Routing, resolved: asyncio.Queue[Found]) -> PathsResolved:
        event = await asyncio.wait_for(resolved.get(), 10)
        while not isinstance(event, PathsResolved):  # rules ask for fewer bits of some marks
            event = await asyncio.wait_for(resolved.get(), 10)
        for command in routing.resolved(event):
            assert isinstance(command, do.SetPaths)
            self._set_paths(command.origin, command.paths)
            self.data.set(Setting.MARKS, command.marks)
        return event

    def _set_paths(self, origin: Origin, paths: Iterable[tuple[Network, FlowPath]]) -> None:
        self.data.set_paths(origin, [(to, self.distort_path(path)) for to, path in paths])

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

    def counted(self) -> tuple[int, ...]:
        """Return how many calls the hooks have let through, and how many refused."""
        counters = self.data.counters()
        return tuple(sum(counters[one] for one in reasons) for reasons in COUNTED)


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
        capture = Capture(far, FAR_END)
        stack.callback(capture.close)
        made = TwoNamespaces(near, cgroup, pins, capture, Devices(near))
        stack.callback(made.close)
        made.container = stack.enter_context(container(f"{name}-c", near, cgroup, capture))
        yield made
