"""A status document as a controller and the hooks' maps give it, for the tests of what shows it."""

from __future__ import annotations

from typing import Any, Literal

from ipsecgate.admin.status_document import Negotiated, Policy, Refused, Status
from ipsecgate.core.tables.layout import Reason
from ipsecgate.edges.bpf.objects import HOOKS

GATED = 42  # id of the gated cgroup


def policy(
    name: str,
    coverage: str | None,
    action: Literal["protect", "bypass", "discard"] = "protect",
    error: str = "",
) -> Policy:
    return {
        "name": name,
        "action": action,
        "remote": ["10.2.0.0/16"],
        "protocol": "any",
        "port": "any",
        "local_port": "any",
        "child": None,
        "initiate": "on-demand",
        "derived": False,
        "source": "/etc/ipsecgate/ipsecgate.toml:3",
        "coverage": coverage,
        "uncovered": [],
        "children": [],
        "last_error": error,
        "advice": "",
        "failed_at": 995.0 if error else None,
    }


def refused(policy: str | None, cgroup: int, requests: int, packets: int = 0) -> Refused:
    return {
        "policy": policy,
        "cgroup_id": cgroup,
        "comm": "curl",
        "flow": "tcp 10.2.0.5:5432",
        "time": 1000.0,
        "refused": requests,
        "blocked": packets,
    }


def negotiated(policy: str, outcome: str, count: int) -> Negotiated:
    return {"policy": policy, "outcome": outcome, "count": count}


def status(**changed: Any) -> Status:
    """Return a gate with three policies and traffic; `changed` replaces fields."""
    reasons = {r.name.lower(): int(r) for r in Reason if r < Reason.AUDITED}
    document: Status = {
        "instance": "default",
        "mode": "enforce",
        "default": "allow",
        "sa_source": "xfrm",
        "published": True,
        "controller": {"alive": True, "ready": True, "pid": 7, "since": 500.25},
        "healthy": False,
        "problems": [],
        "refused": [],
        "warnings": [],
        "errors": [{"text": "cgroup /sys/fs/cgroup/web does not exist", "advice": "start it"}],
        "hooks": [
            {"cgroup": "/x", "cgroup_id": GATED, "hook": hook, "attached": True, "prog_id": 1}
            for hook in HOOKS
        ],
        "policies": [
            policy("db", "covered"),
            policy("web", "uncovered", error="no proposal chosen"),
            policy("lan", None, "bypass"),
        ],
        "counters": {
            "allowed": 100,
            "refused": 20,
            "audited": 0,
            "leaked_blocked": 3,
            "leaked_audited": 0,
            "events_lost": 1,
            "reasons": reasons,
            "held": 9,
        },
        "hook_tables": {
            "policy_masks": 2,
            "policy_entries": 3,
            "spd_masks": 4,
            "spd_entries": 5,
            "memory": 4096,
        },
        "drift": {"kernel": 1, "maps": 2},
        "negotiations": [
            {
                "child": "net/web",
                "state": "back-off",
                "attempts": 2,
                "last_error": "no proposal chosen",
                "advice": "compare both sides",
                "failed_at": 995.0,
                "flow": "tcp 10.3.0.5:80",
                "policy": "web",
            }
        ],
        "negotiated": [negotiated("db", "established", 4), negotiated("web", "failed", 2)],
        "refused_by_policy": [refused("db", GATED, 5), refused(None, 43, 7, 1)],
        "refused_by_cgroup": [refused("db", GATED, 5), refused(None, 43, 7, 1)],
        "sas": [],
        "holds": [
            {
                "pid": 70,
                "comm": "curl",
                "flow": "tcp 10.3.0.5:80",
                "daddr": "10.3.0.5",
                "proto": 6,
                "dport": 80,
                "since": 990.0,
                "limit": 30.0,
                "child": None,
                "policy": "web",
            }
        ],
        "namespaces": [],
        "time_to_covered": [
            {"policy": "db", "buckets": [[0.1, 2], [1.0, 3]], "sum": 2.5, "count": 4}
        ],
    }
    return {**document, **changed}  # type: ignore[typeddict-item]
