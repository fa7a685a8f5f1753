"""One network namespace that is followed, and what tells of changes in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ipsecgate.core.codec.nftables import NETLINK_NETFILTER, NFNLGRP_NFTABLES
from ipsecgate.core.model.events import PathsResolved
from ipsecgate.core.model.flow import Origin
from ipsecgate.edges.kernel.here import NETLINK_ROUTE, Here
from ipsecgate.edges.kernel.namespaces import Namespace
from ipsecgate.edges.kernel.netlink import RawNetlinkSocket
from ipsecgate.edges.kernel.routes import GROUPS


@dataclass(slots=True)
class Followed:
    """A namespace, a gated process in it, its pidfd, and the paths of each origin there."""

    namespace: Namespace
    pid: int
    pidfd: int
    watches: tuple[RawNetlinkSocket, ...]
    origins: dict[Origin, PathsResolved | None] = field(default_factory=dict)
    is_due: bool = True
    here: Here | None = None  # as of its last resolution
    used: frozenset[int] = frozenset()  # the links there that its paths depend on


def reasons(resolved: PathsResolved | None) -> list[str]:
    """Return why packets of some flows pass around the host's SPD."""
    paths = () if resolved is None else resolved.paths
    return sorted({path.outside for _, path in paths if path.outside})


def watches(
    namespace: Namespace, changed: Callable[[object], None]
) -> tuple[RawNetlinkSocket, ...]:
    """Watch the routes of a namespace, and the rules that translate addresses there."""
    routes = RawNetlinkSocket(NETLINK_ROUTE, changed, changed, namespace.socket)
    routes.join(GROUPS)
    try:
        rules = RawNetlinkSocket(NETLINK_NETFILTER, changed, changed, namespace.socket)
        rules.join((NFNLGRP_NFTABLES,))
    except OSError:
        return (routes,)  # the kernel has no nftables
    return routes, rules
