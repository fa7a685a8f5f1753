"""The types of `ipsecgate --json status`, and of the controller's part of it.

Field names are a contract with scripts: fields may be added, but none is renamed or removed.
Times are seconds of the wall clock since the epoch; addresses and flows are text.
"""

from __future__ import annotations

from typing import Literal, TypedDict


class Controller(TypedDict):
    """Whether a controller answers; `pid` and `since` are None if none does."""

    alive: bool
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
    action: str  # protect, bypass or discard
    remote: list[str]  # networks, such as 10.2.0.0/16
    child: str | None  # None: found by traffic selector


class Policy(ConfiguredPolicy):
    """A policy and the state of its SAs."""

    coverage: str | None  # uncovered, negotiating, covered, back-off; None: not `protect`


class Negotiation(TypedDict):
    """One child that a flow has needed since the controller started."""

    child: str  # ike/child; "ike/child to PART" if only a part: a peer, or a network
    state: str  # as Policy.coverage
    attempts: int
    last_error: str  # "" if none
    flow: str  # the flow that asked
    policy: str  # the name of its policy


class Sa(TypedDict):
    """One live outbound SA."""

    spi: str  # 8 hexadecimal digits
    reqid: int
    peer: str  # outer destination address
    child: str | None  # ike/child; None: no CHILD_SA of the IKE daemon
    since: float | None  # installation; None: VICI does not say


class Namespace(TypedDict):
    """Another network namespace, in which gated processes are."""

    pid: int | None  # one of them; None: none is known
    instance: str | None  # the instance that judges its flows; None: this one
    outside: list[str]  # why packets of some of its flows pass around this host's SPD


class Hold(TypedDict):
    """One held call."""

    pid: int  # thread id
    flow: str
    limit: float  # seconds it may be held in all


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

    errors: list[str]  # one sentence each; [] if all is well
    sa_source: str | None  # xfrm or vici; None: `auto`, and not known yet
    policies: list[ConfiguredPolicy]
    negotiations: list[Negotiation]
    sas: list[Sa]
    held: int
    holds: list[Hold]
    namespaces: list[Namespace]
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


class Status(TypedDict):
    """The whole document."""

    instance: str
    mode: Literal["enforce", "audit"]
    default: Literal["allow", "deny"]
    sa_source: str | None  # as GateState.sa_source
    published: bool  # False: no policy is known yet, and all but loopback is refused
    controller: Controller
    errors: list[str]
    hooks: list[Hook]
    policies: list[Policy]
    counters: Counters
    hook_tables: HookTables
    drift: Drift | None
    negotiations: list[Negotiation]
    sas: list[Sa]
    holds: list[Hold]
    namespaces: list[Namespace]
