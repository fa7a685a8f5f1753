"""IPsec's databases: the kernel's SPD entries and SAs, and the IKE daemon's view of them.

A wildcard address (all zero in netlink) is None. Numbers are in host order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field
from enum import IntEnum
from itertools import islice
from typing import NamedTuple

from ipsecgate.core.model.flow import Address, Flow, Network, Selector, TrafficSelector
from ipsecgate.core.model.value import value

ESP = 50
AH = 51
COMP = 108

EXPIRY_SLACK = 2  # seconds after its hard lifetime within which the kernel has deleted a state


class Action(IntEnum):
    """What a policy does with a flow, as in gate.h. Source: RFC 4301 section 4.4.1."""

    PROTECT = 1
    BYPASS = 2
    DISCARD = 3


class Mode(IntEnum):
    """XFRM_MODE_* of linux/xfrm.h.

    UNKNOWN stands for any other mode. An SA with it protects nothing; other SAs are not affected.
    """

    UNKNOWN = -1
    TRANSPORT = 0
    TUNNEL = 1
    ROUTEOPTIMIZATION = 2
    IN_TRIGGER = 3
    BEET = 4
    IPTFS = 5


class Direction(IntEnum):
    """XFRM_POLICY_* of linux/xfrm.h: the policies for locally received and sent packets."""

    IN = 0
    OUT = 1


@value
class Mark:
    """A mark selector: it matches if (mark & mask) == value; mask 0 matches any."""

    value: int = 0
    mask: int = 0


NO_MARK = Mark()


@value
class Template:
    """The SA that a policy requires: struct xfrm_user_tmpl. `spi` 0: any."""

    proto: int
    mode: Mode
    reqid: int
    spi: int = 0
    saddr: Address | None = None
    daddr: Address | None = None
    optional: bool = False

    def accepts(self, sa: SaId) -> bool:
        """Return whether the template's protocol, SPI and destination admit this SA."""
        return self.proto == sa.proto and self.spi in (0, sa.spi) and self.daddr in (None, sa.daddr)


@value
class SpdKey:
    """What identifies a policy: the kernel holds one per key.

    `host_bits`: the bits of source and destination beyond their prefixes. They do not affect
    matching, but 10.0.0.1/8 and 10.0.0.2/8 are two policies.
    """

    selector: Selector
    mark: Mark = NO_MARK
    if_id: int = 0
    host_bits: tuple[int, int] = (0, 0)
    direction: Direction = Direction.OUT
    # Networks take long to hash, so the hash is kept; it leaves out what seldom differs.
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sel = self.selector
        ends = int(sel.dst.network_address), int(sel.src.network_address), self.host_bits
        object.__setattr__(
            self, "_hash", hash((*ends, sel.proto, sel.sport, sel.dport, self.direction))
        )

    def __hash__(self) -> int:
        return self._hash


@value
class SpdEntry:
    """A policy: struct xfrm_userpolicy_info. The lowest `priority` number wins."""

    key: SpdKey
    priority: int
    action: Action
    templates: tuple[Template, ...] = ()
    index: int = 0


@value
class SaId:
    """(destination, SPI, protocol), which identify an SA. Source: RFC 4301 section 4.1."""

    daddr: Address
    spi: int
    proto: int

    def __hash__(self) -> int:
        return hash((int(self.daddr), self.spi, self.proto))  # addresses take long to hash

    def __str__(self) -> str:
        return f"{self.spi:08x} to {self.daddr}"


@value
class Sa:
    """A state of the SAD: struct xfrm_usersa_info with its attributes.

    `selector` None: it has no address family, so it matches every flow.
    `cpu`: the only CPU whose outbound packets it protects (RFC 9611); None: any.
    `larval`: it has no algorithm or SPI 0, so it protects nothing.
    `installed_at`: wall clock, seconds since the epoch.
    `hard_lifetime`: seconds from then to hard expiry; None: unlimited.
    """

    id: SaId
    saddr: Address
    reqid: int
    mode: Mode
    selector: Selector | None = None
    mark: Mark = NO_MARK
    if_id: int = 0
    cpu: int | None = None
    larval: bool = False
    hard_lifetime: int | None = None
    installed_at: int = 0

    @property
    def deadline(self) -> int:
        """When it will have expired: wall clock, seconds since the epoch; 0: never.

        Source: xfrm_timer_handler(), which counts whole seconds and may run late.
        """
        return self.installed_at + self.hard_lifetime + EXPIRY_SLACK if self.hard_lifetime else 0


# --- the IKE daemon's view


class ChildName(NamedTuple):
    """The name of a child configuration: its connection's name, and its own within that.

    `part`: what is negotiated of it by itself: one peer of a wildcard, as a network, or one remote
    network that the peer has left out. None: all of it.
    """

    ike: str
    child: str
    part: Network | None = None

    def __str__(self) -> str:
        whole = f"{self.ike}/{self.child}"
        if self.part is None:
            return whole
        only = self.part if self.part.num_addresses > 1 else self.part.network_address
        return f"{whole} to {only}"

    @property
    def whole(self) -> ChildName:
        """The name of the whole configuration."""
        return self if self.part is None else ChildName(self.ike, self.child)

    def matches(self, written: str) -> bool:
        """Return whether the operator's "ike/child" or "child" means this one."""
        return written in (self.child, str(self.whole))


def similar(written: str, names: Iterable[ChildName]) -> str:
    """Return the child that the operator may have meant, written likewise; "" if none is.

    Only the first 256 names are compared, since that takes some 20 microseconds each.
    """
    from difflib import get_close_matches  # noqa: PLC0415 - seldom used

    known = [str(name.whole) if "/" in written else name.child for name in islice(names, 256)]
    return next(iter(get_close_matches(written, known, n=1)), "")


@value
class ChildConfig:
    """A child configuration that strongSwan has loaded.

    `local` and `remote` are its traffic selectors. `dynamic` becomes the IKE address if that is
    configured, and is left out otherwise. A range of addresses becomes networks. `wildcard`: it
    names no peer (`remote_addrs = %any`, a network or a range) and is in transport mode, so each
    peer has an SA of its own. `peer_id`: the identity that its connection expects the peer to
    prove, "": any; `peer_auth`: by what, such as "pre-shared key", "": not known.
    """

    name: ChildName
    mode: Mode
    local: tuple[TrafficSelector, ...]
    remote: tuple[TrafficSelector, ...]
    wildcard: bool = False
    peer_id: str = ""
    peer_auth: str = ""


@value
class Acquire:
    """The kernel's request for an SA: the flow that needs one, and its policy's template.

    Source: XFRM_MSG_ACQUIRE, struct xfrm_user_acquire in linux/xfrm.h.
    """

    flow: Flow
    template: Template


@value
class ChildSa:
    """An established CHILD_SA, as `list-sas` reports it. SPIs are in host order.

    `local` and `remote` are the negotiated traffic selectors. The peer may have narrowed them, and
    drops everything else, whatever the kernel's policy says. `unique` distinguishes it from others
    of its configuration.

    An SPI alone identifies nothing: its receiver chooses it, so two peers may choose the same one.
    `outbound` and `inbound` identify the kernel's two states.
    """

    name: ChildName
    reqid: int
    spi_in: int
    spi_out: int
    remote_host: Address
    local: tuple[TrafficSelector, ...] = ()
    remote: tuple[TrafficSelector, ...] = ()
    unique: int = 0
    proto: int = ESP
    local_host: Address | None = None  # None: unknown

    @property
    def outbound(self) -> SaId:
        """The state for sent packets."""
        return SaId(self.remote_host, self.spi_out, self.proto)

    @property
    def inbound(self) -> SaId | None:
        """The state for received packets, None if its destination is unknown."""
        if self.local_host is None:
            return None
        return SaId(self.local_host, self.spi_in, self.proto)
