"""The kernel's IPsec databases in RFC 4301's words: SPD entries and SAs.

A wildcard address (all zero on the wire) is None. Numbers are host order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from ipsecgate.core.model.flow import Address, Selector, TrafficSelector

ESP = 50
AH = 51
COMP = 108

EXPIRY_SLACK = 2  # seconds after its hard lifetime by which the kernel has surely let go of a state


class Action(IntEnum):
    """What a policy asks for. Source: RFC 4301 section 4.4.1; values are the map's (gate.h)."""

    PROTECT = 1
    BYPASS = 2
    DISCARD = 3


class Mode(IntEnum):
    """XFRM_MODE_* of linux/xfrm.h.

    UNKNOWN is any that is not here: what has it protects nothing, and stands beside the others.
    """

    UNKNOWN = -1
    TRANSPORT = 0
    TUNNEL = 1
    ROUTEOPTIMIZATION = 2
    IN_TRIGGER = 3
    BEET = 4
    IPTFS = 5


class Direction(IntEnum):
    """XFRM_POLICY_* of linux/xfrm.h: of which packets a policy is asked, if a process has them."""

    IN = 0
    OUT = 1


@dataclass(frozen=True, slots=True)
class Mark:
    """A flow's mark matches when (mark & mask) == value; mask 0 is any."""

    value: int = 0
    mask: int = 0


@dataclass(frozen=True, slots=True)
class Template:
    """What a packet needs: struct xfrm_user_tmpl. `spi` and `reqid` 0: any."""

    proto: int
    mode: Mode
    reqid: int
    spi: int = 0
    saddr: Address | None = None
    daddr: Address | None = None
    optional: bool = False

    def accepts(self, sa: SaId) -> bool:
        """Tell whether it is this SA that it asks for, as far as it says which."""
        return self.proto == sa.proto and self.spi in (0, sa.spi) and self.daddr in (None, sa.daddr)


@dataclass(frozen=True, slots=True)
class SpdKey:
    """What identifies a policy in the kernel: one per key.

    `host_bits`: what the source and destination have beyond their prefixes. They match
    nothing, but 10.0.0.1/8 and 10.0.0.2/8 are two policies.
    """

    selector: Selector
    mark: Mark = field(default_factory=Mark)
    if_id: int = 0
    host_bits: tuple[int, int] = (0, 0)
    direction: Direction = Direction.OUT


@dataclass(frozen=True, slots=True)
class SpdEntry:
    """A policy: struct xfrm_userpolicy_info. Lowest `priority` number wins."""

    key: SpdKey
    priority: int
    action: Action
    templates: tuple[Template, ...] = ()
    index: int = 0


@dataclass(frozen=True, slots=True)
class SaId:
    """(destination, SPI, protocol): what names an SA on the wire. Source: RFC 4301 4.1."""

    daddr: Address
    spi: int
    proto: int

    def __str__(self) -> str:
        return f"{self.spi:08x} to {self.daddr}"


@dataclass(frozen=True, slots=True)
class Sa:
    """A state of the SAD: struct xfrm_usersa_info with its attributes.

    `selector` None: the state's own selector has no family and matches every flow.
    `cpu`: on which alone it protects what leaves (RFC 9611), None = on any.
    `larval`: no algorithm or SPI 0, so it protects nothing.
    `hard_lifetime`: seconds from installation to hard expiry, None = unlimited.
    `installed_at`: when that was, by the wall clock, seconds since the epoch.
    """

    id: SaId
    saddr: Address
    reqid: int
    mode: Mode
    selector: Selector | None = None
    mark: Mark = field(default_factory=Mark)
    if_id: int = 0
    cpu: int | None = None
    larval: bool = False
    hard_lifetime: int | None = None
    installed_at: int = 0

    @property
    def deadline(self) -> int:
        """When it has ended by itself, by the wall clock, seconds since the epoch; 0 = never.

        Source: xfrm_timer_handler(), which looks at whole seconds, and not in each.
        """
        return self.installed_at + self.hard_lifetime + EXPIRY_SLACK if self.hard_lifetime else 0


# --- the IKE daemon's words for the same


class ChildName(NamedTuple):
    """The name of a child configuration: its connection's in swanctl.conf, and its own in that.

    A child's own name is unique only within its connection.
    """

    ike: str
    child: str

    def __str__(self) -> str:
        return f"{self.ike}/{self.child}"

    def matches(self, written: str) -> bool:
        """Return whether the operator's "ike/child" or "child" means this one."""
        return written in (self.child, str(self))


@dataclass(frozen=True, slots=True)
class ChildConfig:
    """A CHILD_SA configuration that strongSwan has loaded, by IKE and child name.

    `local` and `remote` are its traffic selectors; a `dynamic` one is resolved
    to the IKE address where that is configured, else left out; a range of
    addresses becomes the networks that make it up.
    """

    name: ChildName
    mode: Mode
    local: tuple[TrafficSelector, ...]
    remote: tuple[TrafficSelector, ...]


@dataclass(frozen=True, slots=True)
class ChildSa:
    """An established CHILD_SA as `list-sas` shows it. SPIs are host order.

    `local` and `remote` are the traffic selectors as negotiated: the peer may have
    narrowed them, and drops what is outside whatever the kernel's policy says. `unique`
    tells it from others of its configuration.

    An SPI alone names nothing: its receiver chose it, so two peers may have chosen the same, and
    a peer may choose any. `outbound` and `inbound` are the names of the kernel's two states.
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
    local_host: Address | None = None  # None: not told

    @property
    def outbound(self) -> SaId:
        """The state that sends."""
        return SaId(self.remote_host, self.spi_out, self.proto)

    @property
    def inbound(self) -> SaId | None:
        """The state that receives, None where its destination was not told."""
        if self.local_host is None:
            return None
        return SaId(self.local_host, self.spi_in, self.proto)
