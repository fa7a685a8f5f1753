"""What `status` tells, as one document: pinned maps first, the controller's word beside.

Field names are stable once released. Works with the controller dead; what only
a controller can know is then empty, and `controller.alive` is false.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ipsecgate.admin.loader import pins_of
from ipsecgate.core.gate.coverage import Coverage
from ipsecgate.core.gate.gate import Gate
from ipsecgate.core.model.policy import Policy, SaSource, derived
from ipsecgate.core.tables.layout import Reason, Setting, State, TableId
from ipsecgate.core.tables.table import Table, Ternary
from ipsecgate.edges.bpf.maps import Maps
from ipsecgate.edges.host import cgroups, control, saved_state
from ipsecgate.edges.host.config import Config
from ipsecgate.errors import NoControllerError, UsageError
from ipsecgate.paths import Paths

Document = dict[str, Any]


def of_gate(gate: Gate) -> Document:
    """Return what only the controller knows."""
    negotiations = {
        name: {
            "child": str(name),
            "state": item.coverage.value,
            "attempts": item.attempts,
            "last_error": item.last_error,
            "flow": str(item.flow),
            "policy": item.policy,
        }
        for name, item in gate.negotiations.of.items()
    }
    return {
        "errors": [
            *gate.policy_table.errors,
            *([f"IKE: {gate.ike.error}"] if gate.ike.error else []),
            *(f"strongSwan says what is not understood: {reason}" for reason in gate.ike.unread),
        ],
        "sa_source": _told(gate.protection.sa_source),
        "children": [str(c.name) for c in gate.ike.children],
        "policies": [_policy(policy) for policy in gate.policies],
        "negotiations": list(negotiations.values()),
        "sas": _sas(gate),
        "held": gate.holds.total,
        "holds": [
            {"pid": made.pid, "flow": str(made.flow), "limit": made.limit}
            for made in gate.holds.of.values()
        ],
    }


def line(gate: Gate) -> str:
    """Return how it goes, in one line."""
    if gate.ike.error:
        return f"protected flows are refused: IKE: {gate.ike.error}"
    if gate.policy_table.errors:
        return gate.policy_table.errors[0]
    negotiations = gate.negotiations.of.values()
    covered = sum(item.coverage is Coverage.COVERED for item in negotiations)
    trouble = next((item.last_error for item in negotiations if item.last_error), "")
    text = f"{len(gate.policies)} policies; {covered} of {len(negotiations)} children asked for up"
    return f"{text}; {trouble}" if trouble else text


def _sas(gate: Gate) -> list[Document]:
    if gate.protection.in_userland:
        return [
            {
                "spi": f"{sa.spi_out:08x}",
                "reqid": sa.reqid,
                "peer": str(sa.remote_host),
                "child": str(sa.name),
                "since": None,
            }
            for sa in gate.protection.userland.sas()
        ]
    kernel_state = gate.protection.kernel_state
    return [
        {
            "spi": f"{sa.id.spi:08x}",
            "reqid": sa.reqid,
            "peer": str(sa.id.daddr),
            "child": str(name) if (name := kernel_state.child_of(sa)) else None,
            "since": sa.installed_at,
        }
        for sa in kernel_state.outbound_sas()
    ]


def _told(source: SaSource) -> str | None:
    return None if source is SaSource.AUTO else source.value


def _policy(policy: Policy) -> Document:
    return {
        "name": policy.name,
        "action": policy.action.name.lower(),
        "remote": [str(network) for network in policy.remote],
        "child": policy.child,
    }


def document(paths: Paths, read: Callable[[], Config]) -> Document:
    """Return the whole status; `read` reads the configuration, where no controller tells.

    Raises: OSError if nothing is loaded.
    """
    try:
        told = control.ask(paths.control, "status")
        controller = {"alive": True, "pid": told["pid"], "since": told["since"]}
    except NoControllerError:
        told = _without_controller(paths, read)
        controller = {"alive": False, "pid": None, "since": None}
    pins = pins_of(paths)
    with Maps(pins) as maps:
        counters = maps.counters()
        spd = maps.table(TableId.SPD)
        policy_table = maps.table(TableId.POLICY)
        audit = bool(maps.setting(Setting.AUDIT))
        default = "deny" if maps.setting(Setting.DENY) else "allow"
    covered = _covered(policy_table, spd)
    for place, policy in enumerate(told["policies"]):
        policy["coverage"] = _coverage(policy, place in covered, told.get("negotiations", ()))
    paths_by_id = cgroups.by_id()
    return {
        "instance": paths.instance,
        "mode": "audit" if audit else "enforce",
        "default": default,
        "sa_source": told["sa_source"],
        "published": policy_table is not None,
        "controller": controller,
        "errors": told.get("errors", []),
        "hooks": [
            {
                "cgroup": str(paths_by_id.get(a.cgroup_id, "")),
                "cgroup_id": a.cgroup_id,
                "hook": a.hook,
                "attached": a.cgroup_id in paths_by_id,
                "prog_id": a.prog_id,
            }
            for a in pins.attachments()
        ],
        "policies": told["policies"],
        "counters": totals(counters) | {"held": told.get("held", 0)},
        "drift": told.get("drift"),
        "negotiations": told.get("negotiations", []),
        "sas": told.get("sas", []),
        "holds": told.get("holds", []),
    }


def _without_controller(paths: Paths, read: Callable[[], Config]) -> Document:
    """Return what the configuration, and what was remembered, say; one that is broken is told."""
    config, errors = Config(), []
    try:
        config = read()
    except UsageError as error:
        errors.append(str(error))
    policies = config.settings.policies or derived(saved_state.recall(paths.remembered))
    return {
        "policies": [_policy(policy) for policy in policies],
        "sa_source": _told(config.settings.sa_source),
        "errors": errors,
    }


def _covered(policies: Table | None, spd: Table | None) -> set[int]:
    """Return the places of the policies that some live SA covers, wholly or partly."""
    if policies is None or spd is None:
        return set()
    live = [
        Ternary(key, spd.masks[i]) for (i, key), e in spd.entries.items() if e.state is State.LIVE
    ]
    return {
        entry.id
        for (i, key), entry in policies.entries.items()
        if any(Ternary(key, policies.masks[i]).intersect(region) for region in live)
    }


def _coverage(
    policy: Mapping[str, Any], covered: bool, negotiations: Iterable[Mapping[str, Any]]
) -> str | None:
    if policy["action"] != "protect":
        return None
    if covered:
        return Coverage.COVERED.value
    states = {n["state"] for n in negotiations if n["policy"] == policy["name"]}
    pending = (Coverage.NEGOTIATING.value, Coverage.BACK_OFF.value)
    return next((state for state in pending if state in states), Coverage.UNCOVERED.value)


def totals(counters: Mapping[Reason, int]) -> Document:
    """Return the counters by what users ask for, and by reason."""

    def of(prefix: str, reasons: Iterable[Reason] = Reason) -> int:
        return sum(counters[r] for r in reasons if r.name.startswith(prefix))

    return {
        "allowed": of("ALLOW") + counters[Reason.AUDITED],
        "refused": of("REFUSE") - counters[Reason.AUDITED],
        "audited": counters[Reason.AUDITED],
        "leaked_blocked": of("BLOCK") - counters[Reason.AUDITED_PACKETS],
        "leaked_audited": counters[Reason.AUDITED_PACKETS],
        "events_lost": counters[Reason.EVENTS_LOST],
        "reasons": {r.name.lower(): counters[r] for r in Reason if r < Reason.AUDITED},
    }
