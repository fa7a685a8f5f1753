"""Why a flow of a process is let go or refused: the caller's side, then the gate's decision.

    the caller       is its cgroup gated, and in which network namespace is it?
    the decision     the controller's `core.gate.explanation`; without one, the hooks' maps alone

Rules of this module: it changes nothing. The verdict is that of the tables that the hooks search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from errno import errorcode
from pathlib import Path
from typing import Literal, TypedDict

from ipsecgate.admin import instances, loader, offline, ungated
from ipsecgate.admin.answers import checked
from ipsecgate.admin.judge import Judge, Judgement
from ipsecgate.admin.policy_document import policy_of
from ipsecgate.admin.status_document import ConfiguredPolicy
from ipsecgate.core.check.finding import some
from ipsecgate.core.check.ungated import SHOWN, gate_it
from ipsecgate.core.model.flow import Flow
from ipsecgate.core.model.value import value
from ipsecgate.core.tables.layout import EXPLAINED, Reason, Setting
from ipsecgate.edges.bpf.maps import Maps
from ipsecgate.edges.host import cgroups, control
from ipsecgate.edges.host.config import Config
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


class Decided(TypedDict):
    """The controller's answer to the verb `why`."""

    pid: int
    decision: Decision


class Why(Decision):
    """A decision about a flow of a caller. A caller that is not gated is always let go."""

    flow: str
    source: str | None  # as given; None: an unbound socket
    text: str  # the reason in words
    gated: bool | None  # None: no caller was named, and the decision is about one that is gated
    controller: bool  # False: none runs, so the steps are fewer
    mode: Literal["enforce", "audit"]


@value
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


def why(paths: Paths, flow: Flow, caller: Caller | None, read_config: Callable[[], Config]) -> Why:
    """Return the document. Raises: FileNotFoundError if nothing is loaded; GateError, OSError."""
    with Maps(loader.pins_of(paths)) as maps:
        audit = bool(maps.setting(Setting.AUDIT))
        flow = _placed(flow, caller, maps.setting(Setting.NETNS))
        try:
            decision, controller_pid = _ask(paths, flow)
        except NoControllerError:
            policies = offline.state(paths, read_config, None)["policies"]
            decision = _by_tables(Judge.of(maps).judge(flow), flow, policies)
            controller_pid = None
        is_left = maps.is_left(flow.netns)
    steps, gated = list(decision["steps"]), None if caller is None else True
    if caller is not None:
        gated = any(map(caller.cgroup.is_relative_to, loader.gated_cgroups(paths)))
        steps.insert(0, {"step": "caller", "text": _describe(caller, gated)})
    else:
        steps[:0] = [_step("caller", text) for text in _callers(paths, flow)]
    decision = {**decision, "steps": steps}
    if gated is False:
        decision |= {"allowed": True, "reason": "not_gated", "error": None}
        decision["advice"] = _gate(paths, caller) if caller else ""
    elif is_left:
        name = instances.judge_of(loader.pins_of(paths), flow.netns)
        decision |= {"allowed": True, "reason": "allow_other", "error": None}
        decision["advice"] = f"ask it: `ipsecgate -i {name} why` with the same destination"
    return {
        **decision,
        "flow": str(flow),
        "source": None if flow.saddr is None else str(flow.saddr),
        "text": _in_words(decision["reason"], flow, has_controller=controller_pid is not None),
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
    decided = checked(answer, Decided)
    return decided["decision"], decided["pid"]


def _describe(caller: Caller, gated: bool) -> str:
    process = f"process {caller.pid} in " if caller.pid is not None else ""
    state = "gated" if gated else "not gated: the hooks check none of its calls"
    return f"{process}{caller.cgroup}, {state}"


def _gate(paths: Paths, caller: Caller) -> str:
    is_root = caller.cgroup == cgroups.root()
    return gate_it("" if is_root else ungated.target_of(caller.cgroup), ungated.place(paths))


def _callers(paths: Paths, flow: Flow) -> Iterator[str]:
    """Yield which processes the decision is about if no caller is named, and who has the flow."""
    gated = loader.gated_cgroups(paths)
    if cgroups.root() in gated:
        return
    names = some(map(ungated.short_name, gated)) or "none is now"
    yield f"any that is gated ({names}); calls of other processes are not checked"
    if flow.netns:
        return
    wanted = (flow.daddr, flow.proto, flow.dport)
    users = {
        ungated.short_name(cgroup): is_gated
        for one, cgroup, is_gated in ungated.connections(paths)
        if (one.daddr, one.proto, one.dport) == wanted
    }
    for name, is_gated in list(users.items())[:SHOWN]:
        yield f"{name} has such a connection, and is {'' if is_gated else 'not '}gated"


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


def _in_words(reason: str, flow: Flow, *, has_controller: bool) -> str:
    if reason == "refuse_no_source" and flow.saddr is None and not has_controller:
        return "the hooks do not know its source address"
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


def _by_tables(found: Judgement, flow: Flow, policies: Sequence[ConfiguredPolicy]) -> Decision:
    """Return a judgement in words. `policies`: those of the table, in the order of the search."""
    reason, source = found.reason, found.source
    steps = [
        _step("controller", "not running: the hooks decide by what it left them"),
        _step("policy", _named(found, policies)),
    ]
    if reason is Reason.ALLOW_EXEMPT:
        steps.append(_step("exempt", "loopback, DHCP or an address of the host's own"))
    elif reason is Reason.REFUSE_NO_SOURCE and source is None:
        text = "not known: the controller tells the hooks. Assume one with --from"
        steps.append(_step("source", text))
    elif reason in (Reason.ALLOW_COVERED, Reason.REFUSE_UNCOVERED):
        how = "that of the socket" if flow.saddr is not None else "chosen by routing"
        steps.append(_step("source", f"{source}, {how}"))
        live = reason is Reason.ALLOW_COVERED
        steps.append(_step("SA", "live, and protects the flow" if live else "none that is live"))
    return {
        "allowed": found.is_allowed,
        "reason": reason.name.lower(),
        "error": errorcode[found.error] if found.error else None,
        "steps": steps,
        "advice": "" if found.is_allowed else "start a controller: `systemctl start ipsecgate`",
    }


def _named(found: Judgement, policies: Sequence[ConfiguredPolicy]) -> str:
    """Return the policy that names a flow, in words."""
    entry = found.policy
    if entry is None:
        is_known = found.reason is not Reason.REFUSE_NOT_READY
        return "none names this flow" if is_known else "none is known yet"
    if entry.id >= len(policies):
        return f"number {entry.id + 1} of the table: {entry.state.name.lower()}"
    from ipsecgate.core.gate.explanation import describe  # noqa: PLC0415 - seldom used

    return describe(policy_of(policies[entry.id]))


def _step(name: str, text: str) -> Step:
    return {"step": name, "text": text}
