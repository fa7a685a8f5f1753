"""What must be protected: the operator's policies, first match wins.

Where the configuration names none, every remote traffic selector of the loaded
CHILD_SA configurations is one, protect. That set only grows while the gate
remembers it: a gate whose IKE daemon lost its connections is not open.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from errno import EHOSTUNREACH, EPERM, ETIMEDOUT

from ipsecgate.core.model.flow import PORT_MASK, TCP, Flow, Network, TrafficSelector
from ipsecgate.core.model.ipsec import Action, ChildConfig

# How long a call may be held, in seconds: by default; on a non-blocking socket, whose thread has
# other work to do, and for a UDP connect(), because getaddrinfo() makes one for each address;
# and at most (three years), because a timer takes no more.
HOLD = 30.0
HOLD_IMPATIENT = 5.0
HOLD_LONGEST = 1e8


@dataclass(frozen=True, slots=True)
class Policy:
    """Flows towards `remote`, with this protocol (0 any) and destination port.

    `child` is "ike/child" or a child's name, None: found by traffic selector.
    `start`: negotiate as soon as the IKE daemon is there, not when first asked.
    """

    name: str
    remote: tuple[Network, ...]
    action: Action = Action.PROTECT
    proto: int = 0
    ports: tuple[int, int] = (0, PORT_MASK)
    child: str | None = None
    start: bool = False

    def sample_flow(self) -> Flow:
        """Return a flow that it names, to negotiate before anyone asks."""
        network = self.remote[0]
        host = network[0] if network.num_addresses == 1 else network[1]
        return Flow(host, self.proto or TCP, self.ports[0])


@dataclass(frozen=True, slots=True)
class Errnos:
    """What a refused call returns: by the state of the SA that the flow would need."""

    uncovered: int = EPERM
    negotiating: int = EPERM
    failed: int = EHOSTUNREACH
    hold_timeout: int = ETIMEDOUT


class SaSource(Enum):
    """Who says which SAs are live. AUTO: whichever does ESP, as the IKE daemon tells."""

    AUTO = "auto"
    XFRM = "xfrm"
    VICI = "vici"


@dataclass(frozen=True, slots=True)
class Settings:
    """What the operator configured, as far as decisions need it."""

    policies: tuple[Policy, ...] = ()
    audit: bool = False
    deny: bool = False
    errnos: Errnos = field(default_factory=Errnos)
    sa_source: SaSource = SaSource.AUTO
    floor: bool = False  # block what leaves outside gated cgroups, too
    destroy: bool = False  # end the sockets whose SA went, instead of blocking their packets


def derived_policies(children: Iterable[ChildConfig]) -> tuple[Policy, ...]:
    """Return a protect policy for every distinct remote traffic selector.

    Which child protects it is found when a flow asks: the one that it was derived
    from may have been replaced by another of the same selector.
    """
    found: dict[TrafficSelector, Policy] = {}
    for config in children:
        for number, selector in enumerate(config.remote):
            if selector.ports[0] > selector.ports[1]:
                continue  # OPAQUE: ports that no flow has
            suffix = f"#{number}" if len(config.remote) > 1 else ""
            name = f"{config.name}{suffix}"
            policy = Policy(name, (selector.network,), proto=selector.proto, ports=selector.ports)
            found.setdefault(selector, policy)
    return tuple(found.values())
