"""Transcripts of the gate: events in, commands out, and the hook tables that the commands leave.

    transcript = Transcript()
    transcript.after(on.KernelSnapshot((TRAP,), ()), connected(), SOURCES)
    assert initiated(transcript.after(REFUSED)) == [NAME]
    transcript.after(*UP)
    assert transcript.is_open()

No kernel, no IKE daemon, no clock: each event is given, each command is recorded. The constants
are one host with one connection. 192.0.2.1 is this gateway and 192.0.2.2 its peer; the child
"peer/net" protects 10.1.0.0/16 to 10.2.0.0/16.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace
from ipaddress import ip_address, ip_network
from random import Random

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.gate import Gate
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import TCP, Flow, FlowPath, Selector, TrafficSelector
from ipsecgate.core.model.ipsec import (
    ESP,
    Action,
    ChildConfig,
    ChildName,
    ChildSa,
    Mode,
    Sa,
    SaId,
    SpdEntry,
    SpdKey,
    Template,
)
from ipsecgate.core.model.policy import Settings
from ipsecgate.core.tables.layout import Entry, Reason, State, TableId, flow_key
from ipsecgate.core.tables.table import Table

LOCAL, PEER = ip_address("192.0.2.1"), ip_address("192.0.2.2")
HERE, THERE = ip_network("10.1.0.0/16"), ip_network("10.2.0.0/16")
# An application's flow before and after the kernel has chosen its source address.
FLOW = Flow(ip_address("10.2.0.9"), TCP, 80)
ROUTED = replace(FLOW, saddr=ip_address("10.1.0.1"))

NAME = ChildName("peer", "net")
NET = ChildConfig(NAME, Mode.TUNNEL, (TrafficSelector(HERE),), (TrafficSelector(THERE),))
# strongSwan's kernel policy while there is no SA (start_action = trap): no SPI.
TRAP = SpdEntry(
    SpdKey(Selector(HERE, THERE)),
    priority=383616,
    action=Action.PROTECT,
    templates=(Template(ESP, Mode.TUNNEL, reqid=1, saddr=LOCAL, daddr=PEER),),
)
SA = Sa(SaId(PEER, 0xC0FFEE01, ESP), LOCAL, reqid=1, mode=Mode.TUNNEL)
# The kernel policy that replaces the trap when the SA is installed: it names the SA's SPI.
PINNED = replace(TRAP, templates=(replace(TRAP.templates[0], spi=SA.id.spi),))
UP = (on.SaSet(SA), on.PolicySet(PINNED))
# The same SA as the IKE daemon lists it.
LISTED = ChildSa(
    NAME,
    reqid=1,
    spi_in=0x11,
    spi_out=SA.id.spi,
    remote_host=PEER,
    local=(TrafficSelector(HERE),),
    remote=(TrafficSelector(THERE),),
    local_host=LOCAL,
)

REFUSED = on.FlowRefused(FLOW, Reason.REFUSE_UNCOVERED, policy=0, pid=9, comm="curl", cgroup=1)
SOURCES = on.PathsResolved(((THERE, FlowPath(ROUTED.saddr)),))


class Transcript:
    """A gate, and the hook tables that its commands have written so far.

    `remembered`: the child configurations that an earlier controller saved.
    """

    def __init__(
        self, settings: Settings | None = None, remembered: Iterable[ChildConfig] = ()
    ) -> None:
        self.gate = Gate(settings or Settings(), tuple(remembered), Random(1).random)
        self.tables: dict[TableId, Table] = {}
        self._execute(self.gate.start())

    def after(self, *events: on.Event) -> list[do.Command]:
        """Pass events to the gate one by one; return all commands, in order."""
        return [c for event in events for c in self._execute(self.gate.step(event))]

    def after_together(self, *events: on.Event) -> list[do.Command]:
        """Pass events to the gate in one step, as those that arrive together."""
        return self._execute(self.gate.step(*events))

    def entry(self, table: TableId, flow: Flow) -> Entry | None:
        """Look a flow up as the hook does, in what the commands have written."""
        found = self.tables[table].classify(flow_key(flow))
        assert found == self.gate.tables[table].classify(flow_key(flow)), "they have drifted apart"
        return found

    def is_open(self, flow: Flow = ROUTED) -> bool:
        """Return whether the hook would let a protected flow through."""
        entry = self.entry(TableId.SPD, flow)
        return entry is not None and entry.state is State.LIVE

    @property
    def errno(self) -> int:
        """The errno with which the hook refuses the flow while no SA protects it."""
        entry = self.entry(TableId.POLICY, ROUTED)
        assert entry is not None
        assert entry.state in (State.PROTECT, State.DERIVED)
        return entry.error

    def _execute(self, commands: Iterable[do.Command]) -> list[do.Command]:
        """Write to the hook tables as the data path would."""
        executed = list(commands)
        for command in executed:
            if isinstance(command, do.Publish):
                self.tables[command.table] = deepcopy(command.content)
            elif isinstance(command, do.Change):
                for match, entry in command.entries.items():
                    self.tables[command.table].put(match, entry)
        return executed


def connected(*established: ChildSa) -> on.IkeConnected:
    """Return a connection to an IKE daemon that has loaded NET and lists these CHILD_SAs."""
    return on.IkeConnected((NET,), established, pid=42)


def initiated(commands: Iterable[do.Command]) -> list[ChildName]:
    """Return the children whose negotiation the commands start."""
    return [c.name for c in commands if isinstance(c, do.Initiate)]
