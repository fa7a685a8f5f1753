"""The types of `ipsecgate --json status`, and of the controller's part of it.

Field names are a contract with scripts: fields may be added, but none is renamed or removed.
Times are seconds of the wall clock since the epoch; addresses and flows are text.
"""

from __future__ import annotations

from typing import Literal, TypedDict

from ipsecgate.admin.problem_document import Problem


class Controller(TypedDict):
    """Whether a controller answers; `pid` and `since` are None if none does."""

    alive: bool
    ready: bool  # it has published the hook tables, and follows IPsec
    pid: int | None
    since: float | None  # start of the process


class Hook(TypedDict):
    """One hook on one gated cgroup."""

    cgroup: str  # path; "" if the cgroup has been removed
    cgroup_id: int
    hook: str  # connect4, sendmsg6, egress, ...
    attached: bool  # False: the cgroup has been removed
    prog_id: int  # BPF program id


class ConfiguredPolicy(TypedDict):
    """One of the operator's policies, or one derived from a connection."""

    name: str
    action: Literal["protect", "bypass", "discard"]
    remote: list[str]  # networks, such as 10.2.0.0/16
    protocol: str  # any, tcp, udp, or another name or number
    port: str  # of the destination: any, one, or a range such as 5300-5307; ICMP: type << 8 | code
    local_port: str  # of the socket, likewise
    child: str | None  # None: found by traffic selector
    initiate: Literal["on-demand", "start"]
    derived: bool  # from a connection of strongSwan's; its pass-through connections are exceptions
    source: str  # file and line, or the connection that it was derived from


class Policy(ConfiguredPolicy):
    """A policy and the state of its SAs."""

    # covered, partly-covered, negotiating, back-off, uncovered; None: not `protect`
    coverage: str | None
    uncovered: list[str]  # if partly-covered: its networks of which no live SA covers anything
    children: list[str]  # those that its flows have asked for, or that protect some: ike/child
    last_error: str  # why the last negotiation for it that failed did, "" if that is outdated
    advice: str  # what to do about it, "" if nothing is known
    failed_at: float | None  # when that was; None: none did


class Negotiation(TypedDict):
    """One child that a flow has needed since the controller started.

    Its last error is outdated once it is covered, the IKE daemon goes, or it is loaded anew in
    another form.
    """

    child: str  # ike/child; "ike/child to PART" if only a part: a peer, or a network
    state: str  # as Policy.coverage
    attempts: int
    last_error: str  # why the last attempt that failed did; "" if none did, or it is outdated
    advice: str  # what to do about the last error, "" if nothing is known
    failed_at: float | None  # when that attempt ended; None: no last error
    flow: str  # the flow that asked
    policy: str  # the name of its policy


class Negotiated(TypedDict):
    """How often a policy's negotiations ended in one way, since the controller started."""

    policy: str
    outcome: str  # established, failed, narrowed: the peer left the flow out, or aborted: IKE went
    count: int


class Refused(TypedDict):
    """What was refused by one policy, or to one cgroup, since the controller started.

    The policy, the cgroup and the process are those of the last refusal.
    """

    policy: str | None  # None: no policy names the flow
    cgroup_id: int
    comm: str  # the process; "" if only packets were blocked
    flow: str
    time: float  # of the last refusal
    refused: int  # requests, including those that audit mode let through
    blocked: int  # packets, likewise


class Sa(TypedDict):
    """One live outbound SA."""

    spi: str  # 8 hexadecimal digits
    protocol: str  # esp or ah
    reqid: int
    peer: str  # outer destination address
    child: str | None  # ike/child; None: no CHILD_SA of the IKE daemon
    since: float | None  # installation; None: VICI does not say
    until: float | None  # its hard lifetime; None: none, or VICI does not say


class Namespace(TypedDict):
    """Another network namespace, in which gated processes are."""

    pid: int | None  # one of them; None: none is known
    instance: str | None  # the instance that judges its flows; None: this one
    outside: list[str]  # why packets of some of its flows pass around this host's SPD


class HeldCall(TypedDict):
    """One held call."""

    pid: int  # thread id
    flow: str | None  # None, as the next three: no controller runs, and only that knows it
    daddr: str | None
    proto: int | None  # IP protocol
    dport: int | None
    since: float | None  # when the controller took it on; None: no controller runs
    limit: float  # seconds from then on, or from now if no controller runs
    child: str | None  # ike/child that it waits for; None: none is known
    policy: str | None  # that has it held; None: none names it now, or no controller runs


class Hold(HeldCall):
    """A held call and its process."""

    comm: str | None  # the thread's name; None: it has ended


class Refusal(TypedDict):
    """A flow that was refused, or packets of which were blocked, as the hooks remember it."""

    flow: str
    source: str | None  # the socket's address; None: an unbound socket
    reason: str  # as in the counters: refuse_uncovered, block_clear, ...
    text: str  # the reason in words
    cause: str  # why IKE has brought up no SA for it; "" if nothing certain is known
    advice: str  # what to do about the cause, "" if nothing is known
    failed_at: float | None  # when a negotiation failed for that cause; None: no cause
    child: str | None  # ike/child whose negotiation that was
    policy: str | None  # that names it now; None: none does
    last: float  # when it was refused last
    state: str  # what the hooks' tables say of it now, as `reason`


class TimeToCovered(TypedDict):
    """How long flows of one policy waited, from their first refusal until an SA protected them."""

    policy: str  # its name
    buckets: list[list[float]]  # [seconds, how many took at most so long], ascending
    sum: float  # seconds, of all
    count: int  # of all, including those that took longer than every bucket


class Drift(TypedDict):
    """Differences that the minute's comparison found and repaired, since the controller started."""

    kernel: int  # policies and SAs that no notification had reported
    maps: int  # hook-table entries that differed from what was published


class HookCounters(TypedDict):
    """Decisions since the pins were made, by result and by reason."""

    allowed: int  # requests, including `audited`
    refused: int  # requests
    audited: int  # requests that audit mode let through
    leaked_blocked: int  # packets
    leaked_audited: int  # packets that audit mode let through
    events_lost: int  # refusals for which the ring buffer had no room
    reasons: dict[str, int]  # a count for each reason of gate.h, in lower case


class Counters(HookCounters):
    """`HookCounters`, and the calls held since the controller started."""

    held: int


class GateState(TypedDict):
    """The part that a controller knows; without one, what the configuration says."""

    errors: list[Problem]  # [] if all is well
    warnings: list[Problem]  # what may be wrong
    sa_source: str | None  # xfrm or vici; None: `auto`, and not known yet
    policies: list[ConfiguredPolicy]
    negotiations: list[Negotiation]
    negotiated: list[Negotiated]
    refused_by_policy: list[Refused]
    refused_by_cgroup: list[Refused]  # the last 512 cgroups to which something was refused
    sas: list[Sa]
    held: int
    holds: list[HeldCall]
    namespaces: list[Namespace]
    time_to_covered: list[TimeToCovered]  # policies without a flow that was covered are left out
    drift: Drift | None  # None: no controller


class HookTables(TypedDict):
    """How full the hooks' tables are. The limits: 2,031 masks and 1,048,064 entries each."""

    policy_masks: int
    policy_entries: int
    spd_masks: int
    spd_entries: int
    memory: int  # of all maps, in bytes, as the kernel accounts it


class Process(TypedDict):
    """The controller's process."""

    pid: int
    since: float
    ready: bool  # True: the hook tables have been published
    tasks: int  # asyncio tasks
    timers: int


class ControllerStatus(Process, GateState):
    """The controller's answer to the verb `status` on its socket."""

    children: list[str]  # child configurations that the IKE daemon has loaded, as ike/child
    targets: list[str]  # of gate.cgroups, as in force; with gate.host, the root cgroup


class Configured(TypedDict):
    """The controller's answer to the verb `configuration` on its socket: what is in force."""

    policies: list[ConfiguredPolicy]
    derived: list[ConfiguredPolicy]  # what would be derived if no configured policy protected
    mode: str
    default: str
    cgroups: list[str]  # targets; with gate.host, the root cgroup
    floor: str
    live_flows: str
    vici: str
    sa_source: str
    errno: dict[str, str]


class Status(TypedDict):
    """The whole document."""

    instance: str
    mode: Literal["enforce", "audit"]
    default: Literal["allow", "deny"]
    sa_source: str | None  # as GateState.sa_source
    published: bool  # False: no policy is known yet, and all but loopback is refused
    controller: Controller
    healthy: bool  # no problems: exit code 0
    problems: list[Problem]
    errors: list[Problem]  # those of the problems that the controller reports
    warnings: list[Problem]  # as GateState.warnings
    hooks: list[Hook]
    policies: list[Policy]
    refused: list[Refusal]  # in the last 10 minutes and refused still, the last first; at most 100
    counters: Counters
    hook_tables: HookTables
    drift: Drift | None
    negotiations: list[Negotiation]
    negotiated: list[Negotiated]
    refused_by_policy: list[Refused]
    refused_by_cgroup: list[Refused]
    sas: list[Sa]
    holds: list[Hold]
    namespaces: list[Namespace]
    time_to_covered: list[TimeToCovered]
