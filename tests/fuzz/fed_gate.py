"""A running gate that is fed the events which decoders make from damaged input.

Its commands are packed as the data path would write them: a value that no map can hold is also a
finding.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address, ip_network

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.gate import Gate
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import Flow, FlowPath, TrafficSelector
from ipsecgate.core.model.ipsec import ChildConfig, ChildName, ChildSa, Mode
from ipsecgate.core.model.policy import Policy, Settings
from ipsecgate.core.tables import packed
from ipsecgate.core.tables.image import TableImage
from tests.unit.xfrm_bytes import NET, OUT

CHILD = ChildConfig(
    ChildName("gw", "net"), Mode.TUNNEL, (TrafficSelector(ip_network("10.1.0.0/16")),),
    (TrafficSelector(ip_network("10.2.0.0/16")),),
)  # fmt: skip
UP = ChildSa(
    ChildName("gw", "net"),
    1,
    0xC0FFEE00,
    0xC0FFEE01,
    ip_address("192.0.2.2"),
    CHILD.local,
    CHILD.remote,
    local_host=ip_address("192.0.2.1"),
)
KERNEL = on.KernelSnapshot((NET,), (OUT,))
SOURCES = on.PathsResolved(((ip_network("10.2.0.0/16"), FlowPath(ip_address("10.1.0.1"))),))
FLOW = Flow(ip_address("10.2.0.1"), 6, 80)
POLICY = Policy("net", (ip_network("10.2.0.0/16"),))


def settled(*, configured: bool = True) -> Gate:
    """Return a gate that covers 10.1/16 to 10.2/16, by configuration or by loaded connections."""
    gate = Gate(Settings((POLICY,) if configured else ()))
    for command in gate.start():
        write(command)
    step(gate, on.IkeConnected((CHILD,), (UP,), 7), KERNEL, SOURCES)
    assert gate.protection.is_live(FLOW)
    return gate


def step(gate: Gate, *events: on.Event) -> None:
    """Pass events to the gate, and pack its commands."""
    for command in gate.step(*events):
        write(command)


def write(command: do.Command) -> None:
    """Pack the bytes that a command would write into the maps."""
    match command:
        case do.Publish():
            TableImage(command.table).change(command.content.entries(), 1, 0)
        case do.Change():
            TableImage(command.table).change(command.entries.items(), 1, 0)
        case do.SetPaths():
            for network, path in command.paths:
                packed.pack_route(command.origin, network)
                packed.pack_path(path)


def fingerprint(gate: Gate) -> object:
    """Return all state on which decisions depend."""
    return (
        dict(gate.protection.kernel_state.policies),
        dict(gate.protection.kernel_state.inbound),
        dict(gate.protection.kernel_state.sas),
        {sa.id for sa in gate.protection.kernel_state.confirmed_sas()},
        {table: dict(content.entries()) for table, content in gate.tables.items()},
        gate.errors,
        gate.policies,
        gate.ike.loaded.children,
        gate.ike.problem,
        gate.protection.sa_source,
        gate.settings,
        dict(gate.protection.routing.paths),
        sorted(gate.negotiations.by_child),
    )  # fmt: skip


def feed_kernel_events(gate: Gate, events: Iterable[on.XfrmEvent]) -> None:
    """Pass the events of one datagram to the gate, then restore its state as a resync does."""
    step(gate, *events)
    step(gate, KERNEL)
