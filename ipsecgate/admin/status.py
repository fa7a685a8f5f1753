"""Assemble the status document: pinned maps, and what the controller reports.

Works without a controller: its part is then empty, `controller.alive` is false, and the policies
come from the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

from ipsecgate.admin.loader import pins_of
from ipsecgate.admin.status_document import (
    ConfiguredPolicy,
    Controller,
    ControllerStatus,
    Drift,
    GateState,
    Hold,
    Hook,
    HookCounters,
    Negotiation,
    Process,
    Sa,
    Status,
)
from ipsecgate.core.gate.coverage import Coverage
from ipsecgate.core.gate.gate import Gate
from ipsecgate.core.model.policy import Policy, SaSource, derived_policies
from ipsecgate.core.tables.layout import Reason, Setting, State, TableId
from ipsecgate.core.tables.table import Table
from ipsecgate.edges.bpf.maps import Maps
from ipsecgate.edges.bpf.pins import Pins
from ipsecgate.edges.host import cgroups, control, saved_state
from ipsecgate.edges.host.config import Config
from ipsecgate.errors import NoControllerError, UsageError
from ipsecgate.paths import Paths


def controller_status(
    gate: Gate, process: Process, *, changed_entries: int, errors: Sequence[str]
) -> ControllerStatus:
    """Return the controller's part of the document.

    `changed_entries`: hook-table entries that something else had changed and that were repaired.
    `errors`: those that the gate does not know.
    """
    return {
        **process,
        "drift": Drift(kernel=gate.protection.drift, maps=changed_entries),
        "errors": [*_gate_errors(gate), *errors],
        "sa_source": _sa_source(gate.protection.sa_source),
        "children": [str(c.name) for c in gate.ike.loaded.children],
        "policies": [_policy(policy) for policy in gate.policies],
        "negotiations": _negotiations(gate),
        "sas": _userspace_sas(gate) if gate.protection.in_userspace else _kernel_sas(gate),
        "held": gate.holds.total,
        "holds": [
            Hold(pid=made.pid, flow=str(made.flow), limit=made.limit)
            for made in gate.holds.calls.values()
        ],
    }


def summary(gate: Gate) -> str:
    """Return the state of the gate in one line, for the service manager."""
    if gate.ike.error:
        return f"protected flows are refused: IKE daemon: {gate.ike.error}"
    if gate.errors:
        return gate.errors[0]
    negotiations = gate.negotiations.by_child.values()
    covered = sum(item.coverage is Coverage.COVERED for item in negotiations)
    text = f"{len(gate.policies)} policies; {covered} of {len(negotiations)} children covered"
    last_error = next((item.last_error for item in negotiations if item.last_error), "")
    return f"{text}; {last_error}" if last_error else text


def _gate_errors(gate: Gate) -> list[str]:
    return [
        *gate.errors,
        *([f"IKE daemon: {gate.ike.error}"] if gate.ike.error else []),
        *(f"ignored part of what strongSwan reports: {reason}" for reason in gate.ike.unread),
    ]


def _negotiations(gate: Gate) -> list[Negotiation]:
    return [
        {
            "child": str(name),
            "state": item.coverage.value,
            "attempts": item.attempts,
            "last_error": item.last_error,
            "flow": str(item.flow),
            "policy": item.policy,
        }
        for name, item in gate.negotiations.by_child.items()
    ]


def _userspace_sas(gate: Gate) -> list[Sa]:
    return [
        {
            "spi": f"{sa.spi_out:08x}",
            "reqid": sa.reqid,
            "peer": str(sa.remote_host),
            "child": str(sa.name),
            "since": None,
        }
        for sa in gate.protection.userspace_esp.sas()
    ]


def _kernel_sas(gate: Gate) -> list[Sa]:
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


def _sa_source(source: SaSource) -> str | None:
    return None if source is SaSource.AUTO else source.value


def _policy(policy: Policy) -> ConfiguredPolicy:
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
    }


def _without_controller(paths: Paths, read_config: Callable[[], Config]) -> GateState:
    """Return the configured or remembered policies; a broken configuration becomes an error."""
    config, errors = Config(), []
    try:
        config = read_config()
    except UsageError as error:
        errors.append(str(error))
    policies = config.settings.policies or derived_policies(
        saved_state.load_children(paths.remembered)
    )
    return {
        "errors": errors,
        "sa_source": _sa_source(config.settings.sa_source),
        "policies": [_policy(policy) for policy in policies],
        "negotiations": [],
        "sas": [],
        "held": 0,
        "holds": [],
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
