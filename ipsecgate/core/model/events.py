"""Events: the inputs of `core.gate`, as plain data."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from ipsecgate.core.model.flow import HOST, Flow, FlowPath, Network, Origin
from ipsecgate.core.model.ipsec import ChildConfig, ChildName, ChildSa, Sa, SaId, SpdEntry, SpdKey
from ipsecgate.core.model.nat import Service
from ipsecgate.core.model.policy import Settings
from ipsecgate.core.model.problem import Cause, Problem
from ipsecgate.core.model.value import value

# --- kernel: XFRM notifications -------------------------------------------------


@value
class PolicySet:
    """A policy was added or replaced: XFRM_MSG_NEWPOLICY or XFRM_MSG_UPDPOLICY."""

    entry: SpdEntry


@value
class PolicyGone:
    """A policy was removed: XFRM_MSG_DELPOLICY, or POLEXPIRE with `hard` set."""

    key: SpdKey


@value
class PoliciesFlushed:
    """Policies were flushed: XFRM_MSG_FLUSHPOLICY. Resynchronise to see which remain."""


@value
class SaSet:
    """A state was added or changed, in either direction: XFRM_MSG_NEWSA or XFRM_MSG_UPDSA."""

    sa: Sa


@value
class SaGone:
    """A state was removed: XFRM_MSG_DELSA, or EXPIRE with `hard` set (no DELSA follows)."""

    id: SaId


@value
class SasFlushed:
    """States were flushed: XFRM_MSG_FLUSHSA. Resynchronise."""


XfrmEvent = PolicySet | PolicyGone | PoliciesFlushed | SaSet | SaGone | SasFlushed


@value
class KernelSnapshot:
    """A dump of SPD and SAD.

    `check`: no notification was lost before it, so it should contain nothing new.
    """

    policies: tuple[SpdEntry, ...]
    sas: tuple[Sa, ...]
    check: bool = False


# --- kernel: routes --------------------------------------------------------------


@value
class PathsResolved:
    """Where routing leads the flows of an origin, by destination network; the longest prefix wins.

    For `HOST` only: `by_source`: routing may depend on the address that a socket is bound to;
    `marks`: the bits of marks that routing rules ask for; `into_tun` has the form of `paths` and
    gives whether a destination is routed into the TUN device of an IKE daemon that does ESP itself,
    `tun` is that device's interface index, and `tunnels` are the indexes of XFRM and VTI
    interfaces. They are empty and 0 without such devices.
    """

    paths: tuple[tuple[Network, FlowPath], ...]
    origin: Origin = HOST
    by_source: bool = False
    marks: int = 0
    into_tun: tuple[tuple[Network, bool], ...] = ()
    tun: int = 0
    tunnels: frozenset[int] = frozenset()


@value
class OriginGone:
    """Nothing begins there any more: its network namespace has ended, or its device."""

    origin: Origin


@value
class ServicesResolved:
    """The service addresses that NAT rules lead elsewhere (DNAT of the host's own flows)."""

    services: tuple[Service, ...]


# --- the hook --------------------------------------------------------------------


@value
class FlowRefused:
    """A hook refused a flow or the backstop a packet (`pid` 0), or would have in audit mode.

    `reason` is a `layout.Reason`. `policy` is the policy's index among those in force, None if
    no policy matches the flow. `unit`: the systemd unit of `cgroup`; "": none, or not looked up.
    `at`: seconds of CLOCK_MONOTONIC. `untold`: how often the same flow was refused since the last
    event about it.
    """

    flow: Flow
    reason: int
    policy: int | None
    pid: int
    comm: str
    cgroup: int
    unit: str = ""
    at: float = 0.0
    untold: int = 0


# --- IKE -------------------------------------------------------------------------


@value
class ChildUp:
    """A CHILD_SA was established or replaced another (rekeying), whichever peer initiated it."""

    sa: ChildSa


@value
class ChildDown:
    """A CHILD_SA was deleted, or replaced by another (rekeying)."""

    sa: ChildSa


@value
class IkeUp:
    """An IKE_SA was established; `unique` distinguishes it from others of its configuration."""

    ike: str
    unique: int


@value
class IkeDown:
    """An IKE_SA ended, and its CHILD_SAs with it. It may never have been established."""

    ike: str
    unique: int


@value
class IkeConnected:
    """The IKE daemon answered: the loaded children, the established CHILD_SAs, and its pid.

    `userspace_esp`: it does ESP itself (kernel-libipsec), so the kernel has none of its SAs.
    `unread`: errors for the children that could not be parsed. A loaded child is then left out or
    has wider selectors; an established one is left out. The rest of the lists is not affected.
    """

    children: tuple[ChildConfig, ...]
    established: tuple[ChildSa, ...]
    pid: int
    userspace_esp: bool = False
    unread: tuple[str, ...] = ()


@value
class IkeGone:
    """The IKE daemon does not answer. None of its SAs is confirmed any more."""

    problem: Problem


@value
class NegotiationFailed:
    """A negotiation that the gate started ended without a CHILD_SA."""

    name: ChildName
    cause: Cause


@value
class NegotiationDone:
    """The IKE daemon reports the child as up, which does not prove an SA.

    It may have been up before the negotiation.
    """

    name: ChildName


@value
class IkeUnparsed:
    """The IKE daemon sent an event that we could not parse. Its lists give the current state."""

    reason: str


IkeEvent = (
    ChildUp
    | ChildDown
    | IkeUp
    | IkeDown
    | IkeGone
    | IkeUnparsed
    | NegotiationFailed
    | NegotiationDone
)


# --- the operator ------------------------------------------------------------------


@value
class Reconfigured:
    """The operator reloaded the configuration. `Adopted` reports that it is in force."""

    settings: Settings


@value
class Wanted:
    """Somebody waits for a live SA that protects a flow. `child`: only this one will do, "": any.

    It is "ike/child", or a child's own name.
    """

    flow: Flow
    child: str = ""


# --- held system calls -------------------------------------------------------------


@value
class Call:
    """A held system call: the listener that reported it, and its id there."""

    listener: int
    id: int


@value
class CallMade:
    """A thread waits in a system call for a flow, at most `limit` seconds.

    `since`: when the controller took it on, wall clock, seconds since the epoch.
    """

    call: Call
    flow: Flow
    pid: int
    limit: float
    since: float = field(default=0.0, compare=False)


@value
class CallExpired:
    """A held call reached its limit."""

    call: Call


@value
class CallInterrupted:
    """A held call's thread must run a signal handler, and will repeat the call afterwards."""

    call: Call


@value
class CallGone:
    """A held call's thread was killed."""

    call: Call


CallEvent = CallMade | CallExpired | CallInterrupted | CallGone


# --- time ------------------------------------------------------------------------


@value
class Timer:
    """A timer of one child: its negotiation's limit or retry, or the check for a one-way SA."""

    kind: Literal["limit", "retry", "one-way"]
    name: ChildName


@value
class TimerFired:
    """A timer started by `StartTimer` ran out."""

    timer: Timer


@value
class CheckDue:
    """It is time to compare the hooks' tables with what was written into them."""


OtherEvent = (
    KernelSnapshot
    | PathsResolved
    | OriginGone
    | ServicesResolved
    | FlowRefused
    | IkeConnected
    | IkeEvent
    | Reconfigured
    | Wanted
    | TimerFired
    | CheckDue
)
Event = XfrmEvent | CallEvent | OtherEvent
