"""What a candidate configuration would open and close, and which live flows that touches.

    before   what the controller has in force; without one, what is configured
    after    the candidate; without a policy of its own that protects, with the derived ones

Rules of this module: it changes nothing. Policies are compared as sets of flows
(`core.tables.difference`). In audit mode they are compared as if they were enforced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

from ipsecgate.admin import documents, loader
from ipsecgate.admin.answers import checked
from ipsecgate.admin.documents import SettingChange, Touched
from ipsecgate.admin.flows import connections
from ipsecgate.admin.judge import Judge
from ipsecgate.admin.policy_document import (
    policy_document,
    policy_of,
    port_text,
    protocol_name,
)
from ipsecgate.admin.settings_document import settings_document
from ipsecgate.admin.status import ask_controller, controller_of
from ipsecgate.admin.status_document import Configured, ConfiguredPolicy, ControllerStatus
from ipsecgate.core.gate.policy_table import NOT_KNOWN_YET
from ipsecgate.core.model.flow import Flow
from ipsecgate.core.model.ipsec import AH, ESP, SaId
from ipsecgate.core.model.policy import Policy, derived_policies, in_force
from ipsecgate.core.state.spd import sa_tag
from ipsecgate.core.tables.difference import Difference, Effect, Policies, Protocols, differences
from ipsecgate.core.tables.layout import State, TableId
from ipsecgate.edges.bpf.maps import Maps
from ipsecgate.edges.host import cgroups, control, saved_state
from ipsecgate.edges.host.config import Config
from ipsecgate.errors import NoControllerError, UsageError
from ipsecgate.paths import Paths

Kind = Literal["opens", "closes", "changes"]

# What each value of a setting lets through: a change to a higher number closes.
_STRICTNESS = {
    "mode": {"audit": 0, "enforce": 1},
    "default": {"allow": 0, "deny": 1},
    "floor": {"none": 0, "xfrm-block": 1},
}
_MEANING = {
    ("mode", "audit"): "nothing is refused or blocked any more, only counted",
    ("mode", "enforce"): "what was only counted is refused and blocked",
    ("default", "allow"): "flows that no policy names are allowed in clear",
    ("default", "deny"): "flows that no policy names are refused",
    ("floor", "none"): "what leaves outside gated cgroups is no longer blocked",
    ("floor", "xfrm-block"): "what leaves outside gated cgroups is blocked without an SA",
    ("live_flows", "block"): "connections that lose their SA are blocked until the next one",
    ("live_flows", "destroy"): "connections that lose their SA are closed",
}
_NEEDS_RESTART = ("vici", "sa_source")


def compare(
    paths: Paths, file: Path, candidate: Config, read_config: Callable[[], Config]
) -> documents.Difference:
    """Return the document. `read_config` reads what is configured, if no controller runs.

    Raises: UsageError for a candidate that cannot be in force; OSError.
    """
    answer = ask_controller(paths)
    before = _before(paths, read_config)
    after = settings_document(candidate, loader.check_targets(paths, candidate))
    derived = before["derived"]
    old = _policies(before["policies"], ())
    new = _policies(after["policies"], tuple(map(policy_of, derived)))
    found = differences(
        Policies(old, before["default"] == "deny"), Policies(new, after["default"] == "deny")
    )
    settings = [*_settings(before, after), *_cgroups(before["cgroups"], after["cgroups"])]
    kinds = {_kind(one) for one in found} | {one["kind"] for one in settings}
    return {
        "controller": controller_of(answer),
        "candidate": str(file),
        "compared_with": "in force" if answer is not None else "configured",
        "opens": "opens" in kinds,
        "closes": "closes" in kinds,
        "policies": [_change(one) for one in found],
        "settings": settings,
        "touched": list(_touched(paths, answer, found, _ungated(settings, after["cgroups"]))),
    }


def refuse_restarts(paths: Paths, candidate: Config) -> None:
    """Refuse what a reload would refuse.

    Raises: UsageError; NoControllerError, because without one there is nothing to reload.
    """
    before = checked(control.ask(paths.control, "configuration"), Configured)
    after = settings_document(candidate, loader.check_targets(paths, candidate))
    for one in _settings(before, after):
        if one["kind"] == "restart":
            raise UsageError(
                f"{paths.config}: {one['key']}: cannot change while the controller runs",
                hint="restart the controller: this opens nothing, and covered flows go on",
            )


def _before(paths: Paths, read_config: Callable[[], Config]) -> Configured:
    try:
        return checked(control.ask(paths.control, "configuration"), Configured)
    except NoControllerError:
        config = read_config()
        derived = derived_policies(saved_state.load_children(paths.remembered))
        document = settings_document(config, loader.check_targets(paths, config))
        document["derived"] = [policy_document(policy) for policy in derived]
        in_effect = in_force(config.settings.policies, derived)
        document["policies"] = [policy_document(policy) for policy in in_effect]
        return document


def _policies(own: Sequence[ConfiguredPolicy], derived: tuple[Policy, ...]) -> tuple[Policy, ...]:
    """Return the policies in force; if none protects, everything else is refused."""
    return in_force(tuple(map(policy_of, own)), derived or NOT_KNOWN_YET)


def _kind(one: Difference) -> Kind:
    return "opens" if one.opens else "closes" if one.closes else "changes"


def _change(one: Difference) -> documents.Change:
    return {
        "kind": _kind(one),
        "remote": [str(network) for network in one.networks],
        "protocol": _protocols(one.protocols),
        "port": port_text(one.ports),
        "local_port": port_text(one.local_ports),
        "before": effect_name(one.before.effect),
        "after": effect_name(one.after.effect),
        "old_policy": one.before.policy,
        "new_policy": one.after.policy,
    }


def effect_name(effect: Effect) -> str:
    """Return the name that documents have for an effect."""
    return effect.name.lower().replace("_", "-")


def _protocols(protocols: Protocols) -> str:
    names = ", ".join(map(protocol_name, sorted(protocols.numbers)))
    if not protocols.others:
        return names
    return f"not {names}" if names else "any"


def _settings(before: Configured, after: Configured) -> Iterator[SettingChange]:
    for key in ("mode", "default", "floor", "live_flows", *_NEEDS_RESTART):
        old, new = str(before[key]), str(after[key])  # type: ignore[literal-required]
        if old == new:
            continue
        kind: Literal["opens", "closes", "changes", "restart"] = "changes"
        if order := _STRICTNESS.get(key):
            kind = "opens" if order[new] < order[old] else "closes"
        text = _MEANING.get((key, new), "")
        if key in _NEEDS_RESTART:
            kind, text = "restart", "restart the controller: a reload refuses this change"
        yield {"kind": kind, "key": f"gate.{key}", "before": old, "after": new, "text": text}
    for key, old in before["errno"].items():
        new = after["errno"][key]
        if old != new:
            text = "refused calls return another errno"
            yield {
                "kind": "changes",
                "key": f"errno.{key}",
                "before": old,
                "after": new,
                "text": text,
            }


def _cgroups(before: Sequence[str], after: Sequence[str]) -> Iterator[SettingChange]:
    """Yield the targets that begin or stop to be gated; one inside another that stays does not."""
    old, new = cgroups.find_all(before), cgroups.find_all(after)
    for target in old.keys() - new.keys():
        if _is_inside(target, old[target], new):
            continue
        text = "it is no longer gated" + ("" if old[target] else " when it appears")
        yield {
            "kind": "opens", "key": "gate.cgroups", "before": target, "after": "", "text": text
        }  # fmt: skip
    for target in new.keys() - old.keys():
        if _is_inside(target, new[target], old):
            continue
        text = "it is gated" + ("" if new[target] else " when it appears")
        yield {
            "kind": "closes", "key": "gate.cgroups", "before": "", "after": target, "text": text
        }  # fmt: skip


def _is_inside(target: str, found: Sequence[Path], others: dict[str, list[Path]]) -> bool:
    """Tell whether all cgroups of a target are inside one of the others'.

    A path that does not exist yet is inside those that are written above it.
    """
    tops = [path for paths in others.values() for path in paths]
    if not found and not cgroups.is_pattern(target):
        found = [Path(target)]
        tops += [Path(other) for other in others if not cgroups.is_pattern(other)]
    elif not found:
        return any(path == cgroups.root() for path in tops)
    return all(any(path.is_relative_to(top) for top in tops) for path in found)


def _ungated(settings: Sequence[SettingChange], after: Sequence[str]) -> Callable[[Path], bool]:
    """Return what tells whether a cgroup is no longer gated afterwards."""
    targets = [one["before"] for one in settings if one["key"] == "gate.cgroups" and one["before"]]
    left = [path for some in cgroups.find_all(targets).values() for path in some]
    kept = [path for some in cgroups.find_all(after).values() for path in some]

    def is_ungated(cgroup: Path) -> bool:
        return any(map(cgroup.is_relative_to, left)) and not any(map(cgroup.is_relative_to, kept))

    return is_ungated


def _touched(
    paths: Paths,
    answer: ControllerStatus | None,
    found: list[Difference],
    is_ungated: Callable[[Path], bool],
) -> Iterator[Touched]:
    """Yield what is alive now and judged differently; nothing is if nothing is loaded."""
    if not loader.pins_of(paths).loaded:
        return
    with Maps(loader.pins_of(paths)) as maps:
        judge = Judge.of(maps)
        for sock, cgroup in connections(paths):
            flow = sock.flow
            if is_ungated(cgroup):
                yield _live("connection", str(flow), str(cgroup), "opens")
            elif (one := _of(flow, found)) and not (_begins(one) and judge.is_covered(flow)):
                yield _live("connection", str(flow), str(cgroup), _kind(one))
    for call in answer["holds"] if answer is not None else ():
        if call["daddr"] is None or call["proto"] is None or call["dport"] is None:
            continue
        flow = Flow(ip_address(call["daddr"]), call["proto"], call["dport"])
        if one := _of(flow, found):
            yield _live("held call", str(flow), f"thread {call['pid']}", _kind(one))
    yield from _touched_sas(paths, answer, found)


def _begins(one: Difference) -> bool:
    """Tell whether its flows are let go now, and will need an SA; those that have one go on."""
    return one.before.effect is Effect.ALLOW and one.after.effect in (
        Effect.PROTECT,
        Effect.PROTECT_OR_PASS,
    )


def _touched_sas(
    paths: Paths, answer: ControllerStatus | None, differing: list[Difference]
) -> Iterator[Touched]:
    """Yield the SAs whose flows are judged differently; not for those that need it from then on."""
    found = [one for one in differing if not _begins(one)]
    if answer is None or not found:
        return
    with Maps(loader.pins_of(paths)) as maps:
        spd = maps.table(TableId.SPD)
    kinds: dict[int, Kind] = {}
    for match, entry in spd.entries() if spd is not None else ():
        if entry.state is State.LIVE:
            one = next((each for each in found if each.overlaps(match)), None)
            if one is not None:
                kinds.setdefault(entry.id, _kind(one))
    for sa in answer["sas"]:
        proto = AH if sa["protocol"] == "ah" else ESP
        kind = kinds.get(sa_tag(SaId(ip_address(sa["peer"]), int(sa["spi"], 16), proto)))
        if kind is not None:
            yield _live("sa", sa["spi"], sa["peer"], kind)


def _of(flow: Flow, found: list[Difference]) -> Difference | None:
    return next((one for one in found if one.contains(flow)), None)


def _live(
    what: Literal["connection", "held call", "sa"], name: str, where: str, kind: Kind
) -> Touched:
    return {"what": what, "name": name, "where": where, "kind": kind}
