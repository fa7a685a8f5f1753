"""The operator's policies, which say what must be protected. The first match wins.

Without configured policies, each remote traffic selector of the loaded child configurations becomes
a protect policy (`derived_policies`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field
from enum import Enum
from errno import EHOSTUNREACH, EPERM, ETIMEDOUT

from ipsecgate.core.model.flow import PORT_MASK, TCP, Flow, Network, TrafficSelector
from ipsecgate.core.model.ipsec import Action, ChildConfig
from ipsecgate.core.model.value import value

# How long a call may be held, in seconds.
HOLD = 30.0  # by default
# On a non-blocking socket, whose thread has other work to do, and for a UDP connect(), because
# getaddrinfo() makes one for each address.
HOLD_IMPATIENT = 5.0
HOLD_LONGEST = 1e8  # three years; a timer takes no more


@value
class Policy:
    """A rule for the flows to `remote` with this protocol (0: any) and destination port.

    `child`: "ike/child" or a child's own name; None: choose it by traffic selector.
    `start`: negotiate when the IKE daemon connects, instead of at the first flow.
    `derived`: from a connection, so the connections' own exceptions count.
    `origin`: the file and line that it was written in, "" for a derived one.
    """

    name: str
    remote: tuple[Network, ...]
    action: Action = Action.PROTECT
    proto: int = 0
    ports: tuple[int, int] = (0, PORT_MASK)
    child: str | None = None
    start: bool = False
    derived: bool = False
    origin: str = field(default="", compare=False)

    def sample_flow(self) -> Flow:
        """Return a flow that the policy matches, to negotiate for before there is one."""
        network = self.remote[0]
        host = network[0] if network.num_addresses == 1 else network[1]
        return Flow(host, self.proto or TCP, self.ports[0])


@value
class Errnos:
    """The errno of a refused call, by the state of the child that would protect the flow."""

    uncovered: int = EPERM
    negotiating: int = EPERM
    failed: int = EHOSTUNREACH
    hold_timeout: int = ETIMEDOUT


class SaSource(Enum):
    """Where to read which SAs are live. AUTO: from the one that does ESP."""

    AUTO = "auto"
    XFRM = "xfrm"
    VICI = "vici"


@value
class Settings:
    """The configuration, without what only the edges use."""

    policies: tuple[Policy, ...] = ()
    audit: bool = False
    deny: bool = False
    errnos: Errnos = field(default_factory=Errnos)
    sa_source: SaSource = SaSource.AUTO
    floor: bool = False  # also block unprotected traffic from outside gated cgroups
    destroy: bool = False  # destroy sockets whose SA is gone, instead of blocking their packets


FLOOR_PRIORITY = 0xFFFF_0000  # of the host floor's first kernel policy; a low number wins


@value
class FloorPolicy:
    """One policy of the host floor; `place` gives the order. Ports are (value, mask)."""

    place: int
    block: bool
    dst: Network
    proto: int = 0
    sport: tuple[int, int] = (0, 0)
    dport: tuple[int, int] = (0, 0)


def derived_policies(children: Iterable[ChildConfig]) -> tuple[Policy, ...]:
    """Return a protect policy for each distinct remote traffic selector.

    It names no child: by the time of a flow, another child may have replaced the one that it was
    derived from.
    """
    found: dict[TrafficSelector, Policy] = {}
    for config in children:
        for number, selector in enumerate(config.remote):
            if selector.ports[0] > selector.ports[1]:
                continue  # OPAQUE: no flow matches
            suffix = f"#{number}" if len(config.remote) > 1 else ""
            name = f"{config.name}{suffix}"
            policy = Policy(
                name,
                (selector.network,),
                proto=selector.proto,
                ports=selector.ports,
                derived=True,
            )
            found.setdefault(selector, policy)
    return tuple(found.values())
