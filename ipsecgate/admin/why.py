"""Why a flow of a process is let go or refused: the caller's side, then the gate's decision.

    the caller       is its cgroup gated, and in which network namespace is it?
    the decision     the controller's `core.gate.explanation`; without one, the hooks' tables alone

Rules of this module: it changes nothing. The verdict is that of the tables that the hooks search.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from errno import errorcode
from pathlib import Path
from typing import Literal, TypedDict, cast

from ipsecgate.admin import instances, loader
from ipsecgate.core.model.flow import Flow, is_exempt
from ipsecgate.core.tables.layout import EXPLAINED, Reason, Setting, State, TableId, flow_key
from ipsecgate.core.tables.verdict import verdict
from ipsecgate.edges.bpf.maps import Maps
from ipsecgate.edges.host import cgroups, control
from ipsecgate.edges.kernel import namespaces
from ipsecgate.errors import GateError, NoControllerError, UsageError
from ipsecgate.paths import Paths


class Step(TypedDict):
    """One step of the decision."""

    step: str  # caller, policy, exempt, source, kernel policy, SA, IKE
    text: str


class Decision(TypedDict):
    """What the hooks do with a flow of a gated process."""

    allowed: bool
    reason: str  # as in the counters: allow_covered, refuse_uncovered, ...
    error: str | None  # the name of the errno that the call returns; None: it is let go
    steps: list[Step]
    advice: str  # the next thing to do, "" if there is none


class Why(Decision):
    """A decision about a flow of a caller. A caller that is not gated is always let go."""

    flow: str
    source: str | None  # as given; None: an unbound socket
    text: str  # the reason in words
    gated: bool
    controller: bool  # False: none runs, so the steps are fewer
    mode: Literal["enforce", "audit"]


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose call it is: its cgroup, and its process if one is known."""

    cgroup: Path
    pid: int | None = None


def caller_of(pid: int | None, target: str | None) -> Caller | None:
    """Return the caller that options name, None if they name none.

    Raises: UsageError, GateError.
    """
    if pid is not None:
        try:
            return Caller(cgroups.of_process(pid), pid)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise UsageError(f"there is no process {pid}") from error
    return Caller(cgroups.resolve(target)) if target else None


def why(paths: Paths, flow: Flow, caller: Caller | None) -> Why:
    """Return the document. Raises: FileNotFoundError if nothing is loaded; GateError, OSError."""
    with Maps(loader.pins_of(paths)) as maps:
        audit = bool(maps.setting(Setting.AUDIT))
        flow = _placed(flow, caller, maps.setting(Setting.NETNS))
        try:
            decision, controller_pid = _ask(paths, flow)
        except NoControllerError:
            decision, controller_pid = _by_tables(maps, flow), None
        is_left = maps.is_left(flow.netns)
    steps, gated = list(decision["steps"]), True
    if caller is not None:
        gated = any(map(caller.cgroup.is_relative_to, loader.gated_cgroups(paths)))
        steps.insert(0, {"step": "caller", "text": _describe(caller, gated)})
    decision = {**decision, "steps": steps}
    if not gated:
        decision |= {"allowed": True, "reason": "not_gated", "error": None}
        decision["advice"] = f"gate it with `ipsecgate attach {caller.cgroup}`" if caller else ""
    elif is_left:
        name = instances.judge_of(loader.pins_of(paths), flow.netns)
        decision |= {"allowed": True, "reason": "allow_other", "error": None}
        decision["advice"] = f"ask it: `ipsecgate -i {name} why`"
    return {
        **decision,
        "flow": str(flow),
        "source": None if flow.saddr is None else str(flow.saddr),
        "text": _in_words(decision["reason"]),
        "gated": gated,
        "controller": controller_pid is not None,
        "mode": "audit" if audit else "enforce",
    }


def _ask(paths: Paths, flow: Flow) -> tuple[Decision, int]:
    with control.connected(paths.control) as ask:
        answer = ask(
            "why",
            daddr=str(flow.daddr),
            proto=flow.proto,
            dport=flow.dport,
            saddr=None if flow.saddr is None else str(flow.saddr),
            sport=flow.sport,
            mark=flow.mark,
            device=flow.device,
            netns=flow.netns,
        )
    return cast(Decision, answer["decision"]), int(answer["pid"])


def _describe(caller: Caller, gated: bool) -> str:
    process = f"process {caller.pid} in " if caller.pid is not None else ""
    state = "gated" if gated else "not gated: the hooks check none of its calls"
    return f"{process}{caller.cgroup}, {state}"


def _placed(flow: Flow, caller: Caller | None, own: int) -> Flow:
    """Return the flow with its caller's network namespace. `own`: the cookie of the gate's.

    A cgroup has one only if all of its processes are in the same. Raises: GateError.
    """
    if flow.netns or caller is None or not own:
        return flow
    pids = [caller.pid] if caller.pid is not None else list(cgroups.processes(caller.cgroup))
    by_number = {namespaces.inode(pid): pid for pid in pids}
    if len(by_number) != 1 or None in by_number:
        return flow
    (pid,) = by_number.values()
    try:
        there = namespaces.Namespace.of_thread(pid)
    except OSError as error:
        raise GateError(f"cannot tell the network namespace of process {pid}: {error}") from error
    there.close()
    return flow if there.cookie == own else replace(flow, netns=there.cookie)


def _in_words(reason: str) -> str:
    if reason == "not_gated":
        return "its caller is not gated"
    found = Reason[reason.upper()]
    return EXPLAINED.get(found) or _ALLOWED[found]


_ALLOWED = {
    Reason.ALLOW_DEFAULT: "no policy names it, and the default is allow",
    Reason.ALLOW_BYPASS: "its policy lets it leave unprotected",
    Reason.ALLOW_COVERED: "a live SA protects it",
    Reason.ALLOW_PASSED: "a kernel policy lets it leave unprotected, and no [[policy]] forbids it",
    Reason.ALLOW_ASSOCIATED: "a live SA protects it",
    Reason.ALLOW_EXEMPT: "it needs no protection",
    Reason.ALLOW_OTHER: "the instance of its network namespace judges it",
}


# --- without a controller ---------------------------------------------------------------------


def _by_tables(maps: Maps, flow: Flow) -> Decision:
    """Return what the hooks' tables say.

    Only the controller knows the source of an unbound flow.
    """
    steps = [_step("controller", "not running: the tables are as it left them")]
    policies, spd = maps.table(TableId.POLICY), maps.table(TableId.SPD)
    entry = policies.classify(flow_key(flow)) if policies is not None else None
    error = (entry.error if entry else maps.setting(Setting.ERROR)) or 1
    advice = "start a controller: `systemctl start ipsecgate`"
    if policies is None:
        reason = Reason.REFUSE_NOT_READY
    elif entry is None:
        deny = maps.setting(Setting.DENY)
        reason = Reason.REFUSE_DEFAULT if deny else Reason.ALLOW_DEFAULT
        steps.append(_step("policy", "none names this flow"))
    else:
        steps.append(_step("policy", f"number {entry.id}: {entry.state.name.lower()}"))
        reason = {State.BYPASS: Reason.ALLOW_BYPASS, State.DISCARD: Reason.REFUSE_DISCARD}.get(
            entry.state, Reason.REFUSE_UNCOVERED
        )
    is_own = reason is Reason.REFUSE_UNCOVERED and flow.saddr == flow.daddr
    if is_own or (reason >= Reason.REFUSE_UNCOVERED and is_exempt(flow)):
        steps.append(_step("exempt", "loopback, DHCP or an address of the host's own"))
        reason = Reason.ALLOW_EXEMPT
    elif reason is Reason.REFUSE_UNCOVERED and flow.netns:
        steps.append(_step("source", "unknown without a controller, in another network namespace"))
    elif reason is Reason.REFUSE_UNCOVERED and flow.saddr is None:
        steps.append(_step("source", "unknown without a controller: name one with --from"))
    elif reason is Reason.REFUSE_UNCOVERED:
        found = spd.classify(flow_key(flow)) if spd is not None else None
        state = None if found is None else found.state
        derived = entry is not None and entry.state is State.DERIVED
        reason = verdict((flow,), lambda _flow: state, derived=derived, tunneled=False)
        steps.append(_step("SA", "live" if state is State.LIVE else "none that is live"))
    allowed = reason < Reason.REFUSE_UNCOVERED
    return {
        "allowed": allowed,
        "reason": reason.name.lower(),
        "error": None if allowed else errorcode[error],
        "steps": steps,
        "advice": "" if allowed else advice,
    }


def _step(name: str, text: str) -> Step:
    return {"step": name, "text": text}
