"""The types of what `ipsecgate --json` prints, but for `status`, and the list of all of them.

`ipsecgate schema NAME` prints each as a JSON schema (`admin.schema`). Every noun's document says
whether a controller runs, because without one it may know less.
"""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

from ipsecgate.admin.event_documents import Receipt, Record
from ipsecgate.admin.problem_document import Problem
from ipsecgate.admin.status_document import Controller, Hold, Policy, Refusal, Sa, Status
from ipsecgate.admin.top_document import Top
from ipsecgate.admin.wait import Down, Waited
from ipsecgate.admin.why import Why


class Policies(TypedDict):
    """`ipsecgate policies`: those in force, or without a controller, configured."""

    controller: Controller
    published: bool  # False: no policy is known yet, and all but loopback is refused
    default: Literal["allow", "deny"]  # for flows that no policy names
    policies: list[Policy]


class Sas(TypedDict):
    """`ipsecgate sas`: the live outbound SAs."""

    controller: Controller
    sas: list[Sa]


class Holds(TypedDict):
    """`ipsecgate holds`: the calls that wait for an SA."""

    controller: Controller
    holds: list[Hold]


class Connection(TypedDict):
    """A connected TCP or UDP socket of a gated cgroup, in the gate's network namespace."""

    flow: str
    source: str  # address and port
    pid: int | None  # a process of that cgroup which has it open; None: none is known
    comm: str | None  # the name of that process
    cgroup: str
    policy: str | None  # that names it; None: none does
    state: str  # what the hooks' tables say of it now: allow_covered, refuse_uncovered, ...


class Decision(TypedDict):
    """A flow that a processor has let go since the tables last changed."""

    flow: str
    source: str | None  # the socket's address; None: an unbound socket
    reason: str  # allow_covered, allow_bypass, ...


class Flows(TypedDict):
    """`ipsecgate flows`: what the hooks remember, and the gated sockets."""

    controller: Controller
    connections: list[Connection]
    refused: list[Refusal]  # the last first
    decisions: list[Decision]  # 4,096 of each processor at most


class GatedCgroup(TypedDict):
    """One gated cgroup."""

    cgroup: str  # path; "" if it has been removed
    cgroup_id: int
    by: str  # the configured target that names it; "by hand"; "unknown", if it has been removed
    hooks: list[str]
    missing: list[str]  # hooks that it should have, and has not
    processes: int | None  # in it and below it; None: it has been removed
    others: list[str]  # programs of other tools at these hooks, each with its hook
    warnings: list[Problem]  # what those programs may do to the gate


class Awaited(TypedDict):
    """A configured target that names no gated cgroup yet."""

    target: str
    text: str  # why
    advice: str  # what to do, "" if there is nothing


class Cgroups(TypedDict):
    """`ipsecgate cgroups`: what is gated, and what will be."""

    controller: Controller
    cgroups: list[GatedCgroup]
    awaited: list[Awaited]


class Change(TypedDict):
    """Flows that a candidate configuration judges differently."""

    kind: Literal["opens", "closes", "changes"]  # changes: the same effect, by another child
    remote: list[str]
    protocol: str  # any; names joined by commas; "not " before them: all but these
    port: str
    local_port: str
    before: str  # allow, protect-or-pass, protect or refuse
    after: str
    old_policy: str | None  # None: none names them, so the default applies
    new_policy: str | None


class SettingChange(TypedDict):
    """A setting that differs, or a cgroup that begins or stops to be gated."""

    kind: Literal["opens", "closes", "changes", "restart"]  # restart: a reload refuses it
    key: str  # such as gate.mode
    before: str
    after: str
    text: str  # what that means


class Touched(TypedDict):
    """Something alive now that a change affects."""

    what: Literal["connection", "held call", "sa"]
    name: str  # the flow, or the SPI
    where: str  # cgroup, thread or peer
    kind: Literal["opens", "closes", "changes"]


class Difference(TypedDict):
    """`ipsecgate policies --check FILE` and `ipsecgate reload --dry-run`. Nothing was changed."""

    controller: Controller
    candidate: str  # its file
    compared_with: Literal["in force", "configured"]  # configured: no controller runs
    opens: bool
    closes: bool
    policies: list[Change]
    settings: list[SettingChange]
    touched: list[Touched]


class Finding(TypedDict):
    """`ipsecgate check` prints a list of these."""

    name: str
    state: Literal["ok", "warning", "missing"]
    found: str
    hint: str  # what to do, "" if it is ok


class Explanation(TypedDict):
    """`ipsecgate why`."""

    last: Receipt | None  # without HOST:PORT, the refusal that is explained
    flows: list[Why]


class Error(TypedDict):
    """What any verb prints on stderr when it fails."""

    error: str
    hint: str  # what to do next, "" if there is nothing to say
    evidence: NotRequired[str]  # lines that show what happened


DOCUMENTS: dict[str, Any] = {
    "status": Status,
    "policies": Policies,
    "sas": Sas,
    "flows": Flows,
    "cgroups": Cgroups,
    "holds": Holds,
    "difference": Difference,
    "why": Explanation,
    "wait": Waited,
    "down": Down,
    "check": list[Finding],
    "events": list[Record],
    "event": Record,
    "top": Top,
    "error": Error,
}
"""The documents by the name that `ipsecgate schema` has for them."""
