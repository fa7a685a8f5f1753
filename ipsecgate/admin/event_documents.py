"""The types of the records of `ipsecgate --json events`, and what a reader asks for.

A record has a number, `seq`, and numbers only grow. Refusals of one kind share one record, the
receipt: it is kept up to date, and `--follow` tells of that by records that name its number (`of`).
Times are seconds of the wall clock since the epoch; addresses and flows are text.
"""

from __future__ import annotations

from typing import Literal, TypedDict

DENIED = ("refused", "blocked")


class LogMessage(TypedDict):
    """A log message of the controller. `fields`: what it is about, by the name of the field."""

    seq: int
    time: float
    kind: Literal["log"]
    text: str
    level: str  # info, warning or error
    fields: dict[str, str]


class Receipt(TypedDict):
    """One kind of refusal, from the first to the last.

    `scope`: what shares the receipt. `flow`: the attempts of one program at this flow. `program`:
    the many further flows of one program. `all`: those of many programs. Everything else is then
    that of the first of them.
    """

    seq: int
    time: float  # the first
    kind: Literal["refused", "blocked"]  # a call, or a packet
    text: str  # why
    scope: Literal["flow", "program", "all"]
    count: int  # at least so often
    last: float  # when last
    flow: str
    source: str | None  # address that the socket was bound to
    daddr: str
    proto: int
    dport: int
    sport: int  # of the first; 0: not chosen yet
    mark: int
    device: int  # interface index that the socket was bound to; 0: none
    netns: int  # cookie of the network namespace; 0: the gate's own
    reason: str  # of gate.h, in lower case
    policy: str | None  # its name; None: no policy matches the flow
    origin: str | None  # file and line of the policy, or the connection that it is derived from
    audited: bool  # let through, because of audit mode
    pid: int | None  # of the first; None: a packet, whose sender is not known
    comm: str | None
    cgroup_id: int
    cgroup: str | None  # path; None: not known, or gone
    unit: str | None  # the systemd unit that the cgroup belongs to
    container: str | None  # its name, or the first digits of its id
    child: str | None  # the child that would protect the flow, or does, as ike/child
    cause: str | None  # why IKE has not brought it up
    spi: str | None  # of the SA that protects the flow now: 8 hexadecimal digits
    reqid: int | None
    covered_after: float | None  # seconds from `time` until an SA protected the flow


class Update(TypedDict):
    """News of a receipt, for `--follow`: it was refused again, or an SA protects the flow."""

    seq: int
    time: float
    kind: Literal["again", "covered"]
    text: str
    of: int  # the receipt's `seq`
    count: int  # as in the receipt
    flow: str
    policy: str | None
    unit: str | None
    container: str | None
    child: str | None
    spi: str | None
    reqid: int | None
    covered_after: float | None


Record = LogMessage | Receipt | Update
