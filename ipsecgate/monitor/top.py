"""What `top` shows: rates from two samples of the status document, by policy and by cgroup.

Rules of this module: it is pure. A count that went down began anew, as with a new controller.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import field

from ipsecgate.admin.status_document import (
    HookCounters,
    Policy,
    Refused,
    Status,
)
from ipsecgate.admin.top_document import Count, Rates, Top, TopCgroup, TopPolicy
from ipsecgate.core.model.value import value

Coverages = Mapping[str | None, str | None]


@value
class Sample:
    """The gate at one moment.

    `at`: seconds of a clock that only goes forward. `cgroups`: the paths of cgroups by id.
    `held_in`: in which cgroup, by its id, each held call is, by its thread.
    """

    at: float
    status: Status
    cgroups: Mapping[int, str] = field(default_factory=dict)
    held_in: Mapping[int, int] = field(default_factory=dict)


def top(before: Sample | None, now: Sample) -> Top:
    """Return the document of two samples."""
    seconds = None if before is None else max(now.at - before.at, 1e-3)
    status = now.status
    alive = status["controller"]["alive"]
    return {
        "instance": status["instance"],
        "mode": status["mode"],
        "controller": alive,
        "errors": status["errors"],
        "seconds": seconds,
        "rates": _rates(None if before is None else before.status, status, seconds),
        "held": len(status["holds"]),
        "sas": len(status["sas"]) if alive else None,
        "policies": _policies(before, now, seconds),
        "cgroups": _cgroups(before, now, seconds),
    }


def rate(before: int | None, now: int, seconds: float | None) -> float | None:
    """Return how much a count grew in a second. `before`: None if it did not exist."""
    if seconds is None:
        return None
    grown = now - (before or 0)
    return (now if grown < 0 else grown) / seconds


def _rates(before: Status | None, now: Status, seconds: float | None) -> Rates:
    def growth(count: Callable[[HookCounters], int]) -> float | None:
        old = None if before is None else count(before["counters"])
        return rate(old, count(now["counters"]), seconds)

    return {
        "allowed": growth(lambda counters: counters["allowed"]),
        "covered": growth(lambda counters: sum(counters["reasons"][name] for name in _COVERED)),
        "refused": growth(lambda counters: counters["refused"]),
        "audited": growth(lambda counters: counters["audited"]),
        "blocked": growth(lambda counters: counters["leaked_blocked"]),
    }


_COVERED = ("allow_covered", "allow_associated")


def _policies(before: Sample | None, now: Sample, seconds: float | None) -> list[TopPolicy]:
    status = now.status
    known: dict[str | None, Policy] = {policy["name"]: policy for policy in status["policies"]}
    refused = {one["policy"]: one for one in status["refused_by_policy"]}
    old = {} if before is None else {o["policy"]: o for o in before.status["refused_by_policy"]}
    held = Counter(hold["policy"] for hold in status["holds"])
    alive = status["controller"]["alive"]
    found: list[TopPolicy] = []
    for name in dict.fromkeys([*known, *refused, *held]):
        policy = known.get(name)
        found.append(
            {
                "policy": name,
                "action": policy["action"] if policy else None,
                "coverage": policy["coverage"] if policy else None,
                "last_error": policy["last_error"] if policy else "",
                **_count(old.get(name), refused.get(name), seconds if alive else None, alive),
                "held": held[name],
            }
        )
    return found


def _cgroups(before: Sample | None, now: Sample, seconds: float | None) -> list[TopCgroup]:
    status = now.status
    gated = [hook["cgroup_id"] for hook in status["hooks"] if hook["attached"]]
    refused = {one["cgroup_id"]: one for one in status["refused_by_cgroup"]}
    old = {} if before is None else {o["cgroup_id"]: o for o in before.status["refused_by_cgroup"]}
    held = Counter(now.held_in[h["pid"]] for h in status["holds"] if h["pid"] in now.held_in)
    coverage: Coverages = {policy["name"]: policy["coverage"] for policy in status["policies"]}
    alive = status["controller"]["alive"]
    found: list[TopCgroup] = []
    for number in dict.fromkeys([*gated, *refused, *held]):
        one = refused.get(number)
        policy = one["policy"] if one else None
        path = now.cgroups.get(number, "")
        found.append(
            {
                "cgroup": path,
                "cgroup_id": number,
                "unit": _unit(path),
                "policy": policy,
                "coverage": coverage.get(policy),
                **_count(old.get(number), one, seconds if alive else None, alive),
                "held": held[number],
            }
        )
    return found


def _count(
    before: Refused | None, now: Refused | None, seconds: float | None, alive: bool
) -> Count:
    refused, blocked = (now["refused"], now["blocked"]) if now else (0, 0)
    old = (before["refused"], before["blocked"]) if before else (None, None)
    return {
        "refused": refused if alive else None,
        "refused_per_second": rate(old[0], refused, seconds),
        "blocked": blocked if alive else None,
        "blocked_per_second": rate(old[1], blocked, seconds),
        "held": 0,
        "comm": now["comm"] if now else "",
        "flow": now["flow"] if now else "",
        "last": now["time"] if now else None,
    }


def _unit(path: str) -> str:
    parts = reversed(path.split("/"))
    return next((part for part in parts if part.endswith((".service", ".scope"))), "")
