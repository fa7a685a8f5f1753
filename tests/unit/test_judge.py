"""The verdict that is read from the hooks' tables is the controller's, and `why` says the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from errno import EPERM
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from ipsecgate.admin.judge import Judge
from ipsecgate.admin.policy_document import policy_document
from ipsecgate.admin.why import _by_tables
from ipsecgate.core.gate.explanation import explain
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import ANY_V4, ANY_V6, Flow, FlowPath
from ipsecgate.core.model.ipsec import Action
from ipsecgate.core.model.policy import Policy, Settings
from ipsecgate.core.tables.layout import Reason, Setting, TableId
from tests.unit.transcript import FLOW, ROUTED, SOURCES, THERE, TRAP, UP, Transcript, connected


class Maps:
    """What the hooks have of a transcript's gate."""

    def __init__(self, transcript: Transcript) -> None:
        self._gate = transcript.gate
        self._tables = transcript.tables

    def setting(self, setting: Setting) -> int:
        settings = self._gate.settings
        return {
            Setting.DENY: int(settings.deny),
            Setting.PATHS: self._gate.protection.routing.bound_too,
            Setting.ERROR: settings.errnos.uncovered,
        }[setting]

    def path(self, flow: Flow) -> FlowPath | None:
        return self._gate.protection.routing.path(flow)

    def table(self, table: TableId) -> Any:
        return self._tables.get(table)


def judge_of(transcript: Transcript) -> Judge:
    maps: Any = Maps(transcript)
    return Judge.of(maps)


PROTECT = Policy("db", (THERE,))
OUT = Policy("out", (THERE,), Action.BYPASS)
ALL = Policy("all", (ANY_V4, ANY_V6))
FLOWS = {
    "unbound": FLOW,
    "bound": ROUTED,
    "another source": replace(FLOW, saddr=ip_address("10.1.0.77")),
    "elsewhere": replace(FLOW, daddr=ip_address("198.51.100.1")),
    "loopback": replace(FLOW, daddr=ip_address("127.0.0.1")),
    "its own address": replace(ROUTED, daddr=ROUTED.saddr or THERE[1]),
    "a namespace": replace(FLOW, netns=7),
}
LOADED = (on.KernelSnapshot((TRAP,), ()), connected(), SOURCES)
WORLDS: dict[str, tuple[Settings, tuple[on.Event, ...]]] = {
    "nothing known": (Settings(), ()),
    "no SA": (Settings(policies=(PROTECT,)), LOADED),
    "an SA": (Settings(policies=(PROTECT,)), (*LOADED, *UP)),
    "derived": (Settings(), (*LOADED, *UP)),
    "no routes": (Settings(policies=(PROTECT,)), (on.KernelSnapshot((), ()), connected())),
    "bypass": (Settings(policies=(OUT, ALL)), (on.KernelSnapshot((), ()), connected(), SOURCES)),
    "deny": (Settings(policies=(PROTECT,), deny=True), (on.KernelSnapshot((), ()), connected())),
    "discard": (
        Settings(policies=(replace(OUT, action=Action.DISCARD),)), (on.KernelSnapshot((), ()),)
    ),
    "around the SPD": (
        Settings(policies=(PROTECT,)),
        (on.KernelSnapshot((), ()), connected(),
         on.PathsResolved(((THERE, FlowPath(ROUTED.saddr, outside="it leaves by macvlan")),))),
    ),
}  # fmt: skip


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> Transcript:
    settings, events = WORLDS[request.param]
    transcript = Transcript(settings)
    transcript.after(*events)
    return transcript


@pytest.mark.parametrize("name", FLOWS)
def test_the_tables_and_the_controller_agree(world: Transcript, name: str) -> None:
    found, explained = judge_of(world).judge(FLOWS[name]), explain(world.gate, FLOWS[name])
    assert (found.reason, found.error) == (explained.reason, explained.error)
    assert found.is_allowed is explained.is_allowed
    assert (found.error == 0) is found.is_allowed
    policy = world.gate.policy_table.policy_for(FLOWS[name])
    names = [policy.name for policy in world.gate.policies]
    assert found.name_in(names) == (policy[1].name if policy else None)


def decided(transcript: Transcript, flow: Flow = FLOW) -> tuple[Any, Callable[[str], list[str]]]:
    policies = [policy_document(policy) for policy in transcript.gate.policies]
    found = _by_tables(judge_of(transcript).judge(flow), flow, policies)
    return found, lambda step: [s["text"] for s in found["steps"] if s["step"] == step]


def test_without_a_controller_why_says_what_the_tables_do() -> None:
    transcript = Transcript(Settings(policies=(PROTECT,)))
    transcript.after(*LOADED)
    found, said = decided(transcript)
    assert (found["allowed"], found["reason"], found["error"]) == (
        False, "refuse_uncovered", "EPERM",
    )  # fmt: skip
    assert said("policy")[0].startswith("db protects")
    assert said("source") == [f"{ROUTED.saddr}, chosen by routing"]
    assert said("SA") == ["none that is live"]
    assert "start a controller" in found["advice"]
    transcript.after(*UP)
    found, said = decided(transcript, ROUTED)
    assert (found["allowed"], found["error"], found["advice"]) == (True, None, "")
    assert said("source") == [f"{ROUTED.saddr}, that of the socket"]
    assert said("SA") == ["live, and protects the flow"]


def test_a_source_that_is_not_known_can_be_assumed() -> None:
    transcript = Transcript(Settings(policies=(PROTECT,)))
    transcript.after(on.KernelSnapshot((TRAP,), ()), connected())
    found, said = decided(transcript)
    assert found["reason"] == "refuse_no_source"
    assert "--from" in said("source")[0]


def test_a_policy_that_the_configuration_no_longer_has_is_named_by_its_number() -> None:
    transcript = Transcript(
        Settings(policies=(replace(PROTECT, remote=(ip_network("10.9.0.0/16"),)), PROTECT))
    )
    transcript.after(*LOADED)
    judgement = judge_of(transcript).judge(FLOW)
    assert judgement.name_in(["only one"]) is None
    steps = _by_tables(judgement, FLOW, [])["steps"]
    assert steps[1]["text"] == "number 2 of the table: protect"
    assert judgement.error == EPERM
    assert judgement.reason is Reason.REFUSE_UNCOVERED
