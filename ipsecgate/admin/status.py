"""Assemble the status document: pinned maps, and what the controller reports (`controller.report`).

Works without a controller: its part is then empty, `controller.alive` is false, and the policies
come from the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import cast

from ipsecgate.admin.loader import pins_of
from ipsecgate.admin.status_document import (
    ConfiguredPolicy,
    Controller,
    ControllerStatus,
    GateState,
    Hook,
    HookCounters,
    Negotiation,
    Status,
)
from ipsecgate.core.gate.coverage import Coverage
from ipsecgate.core.model.policy import Policy, SaSource, derived_policies, in_force
from ipsecgate.core.tables.layout import Reason, Setting, State, TableId
from ipsecgate.core.tables.table import Table
from ipsecgate.edges.bpf.maps import Maps
from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.edges.host import cgroups, control, saved_state
from ipsecgate.edges.host.config import Config
from ipsecgate.errors import NoControllerError, UsageError
from ipsecgate.paths import Paths


def sa_source(source: SaSource) -> str | None:
    """Return where SAs come from, None until strongSwan's answer shows it."""
    return None if source is SaSource.AUTO else source.value


def policy_document(policy: Policy) -> ConfiguredPolicy:
    """Return a policy as the document has it, without its coverage."""
    return {
        "name": policy.name,
        "action": policy.action.name.lower(),
        "remote": [str(network) for network in policy.remote],
        "child": policy.child,
    }


def status_of(paths: Paths, read_config: Callable[[], Config]) -> Status:
    """Return the whole document. `read_config` is only called if no controller answers.

    Raises: FileNotFoundError if nothing is loaded; OSError.
    """
    gate: GateState
    controller: Controller
    try:
        answer = cast(ControllerStatus, control.ask(paths.control, "status"))
        gate, controller = answer, Controller(alive=True, pid=answer["pid"], since=answer["since"])
    except NoControllerError:
        gate = _without_controller(paths, read_config)
        controller = Controller(alive=False, pid=None, since=None)
    pins = pins_of(paths)
    with Maps(pins) as maps:
        counters = _hook_counters(maps.counters())
        spd = maps.table(TableId.SPD)
        policy_table = maps.table(TableId.POLICY)
        audit = bool(maps.setting(Setting.AUDIT))
        deny = bool(maps.setting(Setting.DENY))
        memory = maps.memory()
    covered = _covered(policy_table, spd)
    return {
        "instance": paths.instance,
        "mode": "audit" if audit else "enforce",
        "default": "deny" if deny else "allow",
        "sa_source": gate["sa_source"],
        "published": policy_table is not None,
        "controller": controller,
        "errors": gate["errors"],
        "hooks": _hooks(pins),
        "policies": [
            {**policy, "coverage": _coverage(policy, place in covered, gate["negotiations"])}
            for place, policy in enumerate(gate["policies"])
        ],
        "counters": {**counters, "held": gate["held"]},
        "hook_tables": {
            "policy_masks": len(policy_table.rows) if policy_table else 0,
            "policy_entries": policy_table.size if policy_table else 0,
            "spd_masks": len(spd.rows) if spd else 0,
            "spd_entries": spd.size if spd else 0,
            "memory": memory,
        },
        "drift": gate["drift"],
        "negotiations": gate["negotiations"],
        "sas": gate["sas"],
        "holds": gate["holds"],
        "namespaces": gate["namespaces"],
    }


def _without_controller(paths: Paths, read_config: Callable[[], Config]) -> GateState:
    """Return the configured or remembered policies; a broken configuration becomes an error."""
    config, errors = Config(), []
    try:
        config = read_config()
    except UsageError as error:
        errors.append(str(error))
    derived = derived_policies(saved_state.load_children(paths.remembered))
    policies = in_force(config.settings.policies, derived)
    return {
        "errors": errors,
        "sa_source": sa_source(config.settings.sa_source),
        "policies": [policy_document(policy) for policy in policies],
        "negotiations": [],
        "sas": [],
        "held": 0,
        "holds": [],
        "namespaces": [],
        "drift": None,
    }


def _hooks(pins: Pins) -> list[Hook]:
    paths_by_id = cgroups.by_id()
    return [
        {
            "cgroup": str(paths_by_id.get(attachment.cgroup_id, "")),
            "cgroup_id": attachment.cgroup_id,
            "hook": attachment.hook,
            "attached": attachment.cgroup_id in paths_by_id,
            "prog_id": attachment.prog_id,
        }
        for attachment in pins.attachments()
    ]


def _covered(policies: Table | None, spd: Table | None) -> set[int]:
    """Return the places of the policies that some live SA covers, wholly or partly."""
    if policies is None or spd is None:
        return set()
    covered: set[int] = set()
    for live_mask, live_row in spd.rows.items():
        live = [value for value, entry in live_row.items() if entry.state is State.LIVE]
        for mask, row in policies.rows.items():
            common = mask.masked(live_mask)
            shared = {value.masked(common) for value in live}
            covered |= {entry.id for value, entry in row.items() if value.masked(common) in shared}
    return covered


def _coverage(
    policy: ConfiguredPolicy, covered: bool, negotiations: Iterable[Negotiation]
) -> str | None:
    if policy["action"] != "protect":
        return None
    if covered:
        return Coverage.COVERED.value
    states = {n["state"] for n in negotiations if n["policy"] == policy["name"]}
    pending = (Coverage.NEGOTIATING.value, Coverage.BACK_OFF.value)
    return next((state for state in pending if state in states), Coverage.UNCOVERED.value)


def _hook_counters(counters: Mapping[Reason, int]) -> HookCounters:
    """Return the hooks' counters, added up by result, and each by its reason."""

    def total(prefix: str) -> int:
        return sum(count for reason, count in counters.items() if reason.name.startswith(prefix))

    return {
        "allowed": total("ALLOW") + counters[Reason.AUDITED],
        "refused": total("REFUSE") - counters[Reason.AUDITED],
        "audited": counters[Reason.AUDITED],
        "leaked_blocked": total("BLOCK") - counters[Reason.AUDITED_PACKETS],
        "leaked_audited": counters[Reason.AUDITED_PACKETS],
        "events_lost": counters[Reason.EVENTS_LOST],
        "reasons": {r.name.lower(): counters[r] for r in Reason if r < Reason.AUDITED},
    }
