"""Name lookups that are refused while IKE needs them: a deadlock that nothing else would end.

IKE cannot begin without the peer's address. If that is a name, a resolver must ask its server, and
if the resolver is gated and the server is in a protected network, the lookup waits for IKE.

Rules of this module: it only names the deadlock. What ends it is the operator's decision, because a
lookup that is let go leaves in clear.
"""

from __future__ import annotations

from collections import deque
from dataclasses import field

from ipsecgate.core.gate import commands as do
from ipsecgate.core.model.flow import PROTOCOL_NAMES, TCP, UDP, Address, Flow
from ipsecgate.core.model.ipsec import ChildName
from ipsecgate.core.model.problem import Cause, Problem
from ipsecgate.core.model.value import value

PORTS = (53, 853, 5353)  # DNS (RFC 1035), over TLS (RFC 7858), multicast (RFC 6762)
KEPT = 16  # lookups


@value
class Lookup:
    """A lookup that was refused or is held. `pid` 0 and `unit` "": unknown."""

    server: Address
    proto: int
    port: int
    policy: str
    comm: str
    pid: int = field(default=0, compare=False)
    unit: str = field(default="", compare=False)


@value
class Deadlock:
    """A connection that needs the address of `host`, and the lookup that waits for it."""

    host: str
    lookup: Lookup
    problem: Problem = field(compare=False)


class NameLookups:
    """The lookups since the last failure of IKE, and the connections that need one of them."""

    def __init__(self) -> None:
        self._lookups: deque[Lookup] = deque(maxlen=KEPT)
        self._waiting: dict[ChildName, Deadlock] = {}

    @property
    def errors(self) -> list[Problem]:
        """Return what the operator should do, for each connection that waits."""
        return [deadlock.problem for deadlock in self._waiting.values()]

    def problem(self, flow: Flow) -> Problem | None:
        """Return that a connection waits for this lookup, None if none does."""
        found = (one.problem for one in self._waiting.values() if one.lookup.server == flow.daddr)
        return next(found, None) if is_lookup(flow) else None

    def refused(self, flow: Flow, policy: str, pid: int, comm: str = "", unit: str = "") -> None:
        """Note a flow that waits for IKE, if it is a lookup."""
        if is_lookup(flow):
            lookup = Lookup(flow.daddr, flow.proto, flow.dport, policy, comm, pid, unit)
            self._lookups.append(lookup)

    def failed(self, name: ChildName, cause: Cause) -> list[do.Command]:
        """Handle the end of a negotiation: did it fail for want of a lookup that was refused?"""
        host, known = cause.unresolved, self._waiting.pop(name, None)
        lookup = self._lookups[-1] if self._lookups else known.lookup if known else None
        self._lookups.clear()
        if not host or lookup is None:
            return []
        is_known = known is not None and known.lookup is lookup
        problem = known.problem if known and is_known else _problem(name, host, lookup)
        self._waiting[name] = Deadlock(host, lookup, problem)
        return [] if known == self._waiting[name] else [do.Log("error", str(problem))]

    def up(self, name: ChildName) -> None:
        """Forget a connection that waits no longer."""
        self._waiting.pop(name, None)


def _problem(name: ChildName, host: str, lookup: Lookup) -> Problem:
    known = ", ".join(filter(None, (f"pid {lookup.pid}" * bool(lookup.pid), lookup.unit)))
    caller = (lookup.comm or "a process") + (f" ({known})" if known else "")
    return Problem(
        f"connection {name.ike} waits for the address of {host}, but policy {lookup.policy} "
        f"refuses the lookup by {caller} at {lookup.server} until that connection is up",
        f"write the address of {host} into remote_addrs, or look it up at a server that needs no "
        "IPsec; or let these lookups leave in clear: before that policy, "
        f'add a [[policy]] with action = "bypass", remote = ["{lookup.server}"], protocol = '
        f'"{PROTOCOL_NAMES[lookup.proto]}" and port = "{lookup.port}"',
    )


def is_lookup(flow: Flow) -> bool:
    """Tell whether a flow is to a name server's port."""
    return flow.proto in (TCP, UDP) and flow.dport in PORTS
