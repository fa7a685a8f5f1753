"""What happened outside, as data. `now` is monotonic seconds, stamped by the shell."""

from __future__ import annotations

from dataclasses import dataclass

from ipsecgate.core.model.flow import Address, Flow, Network
from ipsecgate.core.model.ipsec import ChildConfig, ChildName, ChildSa, Sa, SaId, SpdEntry, SpdKey
from ipsecgate.core.model.policy import Settings

# --- kernel: XFRM notifications -------------------------------------------------


@dataclass(frozen=True, slots=True)
class PolicySet:
    """A policy is in: XFRM_MSG_NEWPOLICY or XFRM_MSG_UPDPOLICY."""

    entry: SpdEntry


@dataclass(frozen=True, slots=True)
class PolicyGone:
    """A policy is out: XFRM_MSG_DELPOLICY, or POLEXPIRE with hard set."""

    key: SpdKey


@dataclass(frozen=True, slots=True)
class PoliciesFlushed:
    """XFRM_MSG_FLUSHPOLICY: resynchronise, the message does not say what was kept."""


@dataclass(frozen=True, slots=True)
class SaSet:
    """A state is in: XFRM_MSG_NEWSA or XFRM_MSG_UPDSA (either direction)."""

    sa: Sa


@dataclass(frozen=True, slots=True)
class SaGone:
    """A state is out: XFRM_MSG_DELSA, or EXPIRE with hard set (no DELSA follows)."""

    id: SaId


@dataclass(frozen=True, slots=True)
class SasFlushed:
    """XFRM_MSG_FLUSHSA: resynchronise."""


XfrmEvent = PolicySet | PolicyGone | PoliciesFlushed | SaSet | SaGone | SasFlushed


@dataclass(frozen=True, slots=True)
class KernelSnapshot:
    """Everything a dump of SPD and SAD showed.

    `check`: nothing was lost before it, so it should tell nothing new.
    """

    policies: tuple[SpdEntry, ...]
    sas: tuple[Sa, ...]
    check: bool = False


# --- kernel: routes --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SourcesResolved:
    """Which source address an unbound socket gets, by destination network.

    None: no route. Longest prefix wins, as in the route table it was read from.
    `into_tun` tells in the same way which destinations are routed into a TUN device
    of the IKE daemon's, and `tun` is that device's index; empty and 0 where there is none.
    """

    sources: tuple[tuple[Network, Address | None], ...]
    into_tun: tuple[tuple[Network, bool], ...] = ()
    tun: int = 0


# --- the hook --------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FlowRefused:
    """The hook refused a flow (in audit mode: would have).

    `reason` is a layout.Reason; `policy` is its place in the configuration,
    None where no policy names the flow.
    """

    flow: Flow
    reason: int
    policy: int | None
    pid: int
    comm: str
    cgroup: int


# --- IKE -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ChildUp:
    """A CHILD_SA came up, or replaced another one (rekeying); either side may have asked."""

    sa: ChildSa


@dataclass(frozen=True, slots=True)
class ChildDown:
    """A CHILD_SA went away, or was replaced (rekeying)."""

    sa: ChildSa


@dataclass(frozen=True, slots=True)
class IkeUp:
    """An IKE_SA was established; `unique` tells it from others of its configuration."""

    ike: str
    unique: int


@dataclass(frozen=True, slots=True)
class IkeDown:
    """An IKE_SA went away, and its children with it; also one that never was established."""

    ike: str
    unique: int


@dataclass(frozen=True, slots=True)
class IkeConnected:
    """The IKE daemon answers: what it has loaded, what it has established, its pid.

    `userspace_esp`: it does ESP itself (kernel-libipsec), so the kernel knows no SA of its.
    `unread`: what was not understood; it is in neither list, and says nothing of what is.
    """

    children: tuple[ChildConfig, ...]
    established: tuple[ChildSa, ...]
    pid: int
    userspace_esp: bool = False
    unread: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class IkeGone:
    """The IKE daemon does not answer. What it had installed is not trusted."""

    reason: str


@dataclass(frozen=True, slots=True)
class NegotiationFailed:
    """A negotiation that the gate asked for ended without a CHILD_SA."""

    name: ChildName
    cause: str


@dataclass(frozen=True, slots=True)
class NegotiationDone:
    """IKE says that the child is up, perhaps that it was all the time. Not proof of an SA."""

    name: ChildName


@dataclass(frozen=True, slots=True)
class IkeUnparsed:
    """The IKE daemon told something that was not understood: what it lists says how it is."""

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


@dataclass(frozen=True, slots=True)
class Reconfigured:
    """The configuration was read anew, whole. `Adopted` tells when it is in force."""

    settings: Settings


# --- held system calls -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call:
    """A system call that waits: the listener that reported it, and its id there."""

    listener: int
    id: int


@dataclass(frozen=True, slots=True)
class CallMade:
    """A thread asks for a flow, and waits to be let go; for at most `limit` seconds."""

    call: Call
    flow: Flow
    pid: int
    limit: float


@dataclass(frozen=True, slots=True)
class CallExpired:
    """A held call has reached its limit."""

    call: Call


@dataclass(frozen=True, slots=True)
class CallInterrupted:
    """A held call's thread has a signal handler to run, and will call again after it."""

    call: Call


@dataclass(frozen=True, slots=True)
class CallGone:
    """A held call's thread does not wait any more: it was killed."""

    call: Call


CallEvent = CallMade | CallExpired | CallInterrupted | CallGone


# --- time ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Timer:
    """A timer of one child: `kind` is "limit" or "retry" of its negotiation, or "half"."""

    kind: str
    name: ChildName


@dataclass(frozen=True, slots=True)
class TimerFired:
    """A timer that the core asked for (`StartTimer`) ran out."""

    timer: Timer


@dataclass(frozen=True, slots=True)
class CheckDue:
    """Time to compare what the hooks have with what they were told."""


OtherEvent = (
    KernelSnapshot
    | SourcesResolved
    | FlowRefused
    | IkeConnected
    | IkeEvent
    | Reconfigured
    | TimerFired
    | CheckDue
)
Event = XfrmEvent | CallEvent | OtherEvent
