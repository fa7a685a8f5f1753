"""The types of `ipsecgate --json top`. Times are seconds of the wall clock since the epoch."""

from __future__ import annotations

from typing import Literal, TypedDict

from ipsecgate.admin.problem_document import Problem


class Count(TypedDict):
    """What was refused, in all and in a second; None: not known yet, or without a controller."""

    refused: int | None  # requests
    refused_per_second: float | None
    blocked: int | None  # packets
    blocked_per_second: float | None
    held: int  # calls, now
    comm: str  # the process of the last refusal, "" if there is none
    flow: str  # the last flow that was refused, likewise
    last: float | None  # when that was


class TopPolicy(Count):
    """One policy."""

    policy: str | None  # None: what no policy names
    action: str | None
    coverage: str | None  # as in the status document
    last_error: str  # why its last negotiation failed, "" if it did not


class TopCgroup(Count):
    """One cgroup: gated itself, or below one that is and refused something."""

    cgroup: str  # path, "" if it has been removed
    cgroup_id: int
    unit: str  # its systemd unit, "" if there is none
    policy: str | None  # that refused last
    coverage: str | None  # of that policy, now


class Rates(TypedDict):
    """What all gated processes did, in a second; None: not known yet."""

    allowed: float | None  # requests
    covered: float | None  # of these
    refused: float | None
    audited: float | None  # of these, let through in audit mode
    blocked: float | None  # packets


class Top(TypedDict):
    """The whole document."""

    instance: str
    mode: Literal["enforce", "audit"]
    controller: bool
    errors: list[Problem]  # as Status.errors
    seconds: float | None  # between the two samples; None: there is only one
    rates: Rates
    held: int
    sas: int | None  # None: no controller runs
    policies: list[TopPolicy]
    cgroups: list[TopCgroup]
