"""The operator's policies, which say what must be protected. The first match wins.

Unless a configured policy protects something, each remote traffic selector of the loaded child
configurations becomes a protect policy (`derived_policies`), after the configured exceptions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field
from enum import Enum
from errno import EHOSTUNREACH, EPERM, ETIMEDOUT

from ipsecgate.core.model.flow import (
    ANY_PORT,
    ICMP,
    TCP,
    Flow,
    Network,
    TrafficSelector,
)
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

    `local_ports`: only the flows from these source ports.
    `child`: "ike/child" or a child's own name; None: choose it by traffic selector.
    `start`: negotiate when the IKE daemon connects, instead of at the first flow.
    `derived`: from a connection, so the connections' own exceptions count.
    `origin`: the file and line that it was written in, "" for a derived one.
    """

    name: str
    remote: tuple[Network, ...]
    action: Action = Action.PROTECT
    proto: int = 0
    ports: tuple[int, int] = ANY_PORT
    child: str | None = None
    start: bool = False
    derived: bool = False
    origin: str = field(default="", compare=False)
    local_ports: tuple[int, int] = ANY_PORT

    def sample_flow(self) -> Flow:
        """Return a flow that the policy matches, to negotiate for before there is one."""
        network = self.remote[0]
        host = network[0] if network.num_addresses == 1 else network[1]
        sport = 0 if self.local_ports == ANY_PORT else max(1, self.local_ports[0])
        return Flow(host, self.proto or TCP, self.ports[0], sport=sport)


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


def protects(policies: Iterable[Policy]) -> bool:
    """Tell whether one of these policies protects something."""
    return any(policy.action is Action.PROTECT for policy in policies)


def in_force(configured: tuple[Policy, ...], derived: tuple[Policy, ...]) -> tuple[Policy, ...]:
    """Return the configured policies, followed by the derived ones if none of them protects."""
    if protects(configured):
        return configured
    return (*configured, *derived) if configured else derived


def derived_policies(children: Iterable[ChildConfig]) -> tuple[Policy, ...]:
    """Return a protect policy for each distinct remote traffic selector, and the local ports to it.

    Its local addresses are left out: when a tunnel collapses, its route goes too, and with it the
    source address of an unbound socket. It names no child: by the time of a flow, another child may
    have replaced the one that it was derived from.
    """
    found: dict[tuple[object, ...], Policy] = {}
    for config in children:
        flows = [
            _flows(remote, local) for remote in config.remote for local in _ends(config, remote)
        ]
        named = dict.fromkeys(one for one in flows if one is not None)
        for number, (network, proto, ports, local_ports) in enumerate(named):
            suffix = f"#{number}" if len(named) > 1 else ""
            policy = Policy(
                f"{config.name}{suffix}", (network,), proto=proto, ports=ports,
                local_ports=local_ports, derived=True,
            )  # fmt: skip
            found.setdefault((network, proto, ports, local_ports), policy)
    return tuple(found.values())


def _ends(config: ChildConfig, remote: TrafficSelector) -> tuple[TrafficSelector, ...]:
    """Return the local selectors that go with a remote one; itself if they are not known."""
    fit = (sel for sel in config.local if sel.network.version == remote.network.version)
    return tuple(fit) or (TrafficSelector(remote.network),)


def _flows(
    remote: TrafficSelector, local: TrafficSelector
) -> tuple[Network, int, tuple[int, int], tuple[int, int]] | None:
    """Return network, protocol, remote and local ports of a pair of selectors; None: no flow."""
    protos = {remote.proto, local.proto} - {0}
    if len(protos) > 1 or any(low > high for low, high in (remote.ports, local.ports)):
        return None  # OPAQUE ports, too, which no flow has
    proto = max(protos, default=0)
    # ICMP has no ports: these are its type and code, on both sides.
    local_ports = ANY_PORT if proto in ICMP else local.ports
    return remote.network, proto, remote.ports, local_ports
