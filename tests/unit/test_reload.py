"""A new configuration for a running gate: what changes in which order, and what is refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from errno import EACCES, EHOSTUNREACH, EPERM
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from ipsecgate.controller.reload import Reload, refuse_what_needs_a_restart
from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.coverage import Coverage
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import Flow, FlowPath
from ipsecgate.core.model.ipsec import Action
from ipsecgate.core.model.policy import Errnos, Policy, SaSource, Settings
from ipsecgate.core.model.problem import Cause, Problem
from ipsecgate.core.tables.layout import State, TableId
from ipsecgate.edges.host.config import Config
from ipsecgate.errors import UsageError
from tests.unit.transcript import (
    FLOW,
    NAME,
    REFUSED,
    ROUTED,
    SOURCES,
    THERE,
    TRAP,
    UP,
    Transcript,
    connected,
    initiated,
)  # fmt: skip

PROTECT = Policy("db", (THERE,))
ELSEWHERE = ip_network("10.3.0.0/16")
FIRST = Policy("first", (ELSEWHERE,), action=Action.BYPASS)
BOTH = on.PathsResolved((*SOURCES.paths, (ELSEWHERE, FlowPath(ip_address("10.1.0.1")))))


def running(*policies: Policy, **settings: object) -> Transcript:
    transcript = Transcript(Settings(policies, **settings))  # type: ignore[arg-type]
    transcript.after(on.KernelSnapshot((TRAP,), ()), connected(), SOURCES)
    return transcript


def reload(transcript: Transcript, *policies: Policy, **settings: object) -> list[do.Command]:
    return transcript.after(on.Reconfigured(Settings(policies, **settings)))  # type: ignore[arg-type]


def kinds(commands: Iterable[do.Command]) -> list[type[do.Command]]:
    return [type(command) for command in commands]


def test_a_covered_flow_stays_open_and_its_policies_are_published_once() -> None:
    transcript = running(PROTECT)
    transcript.after(REFUSED, *UP)
    assert transcript.is_open()
    commands = reload(transcript, FIRST, replace(PROTECT, name="renamed"))
    hook_tables = [c for c in commands if isinstance(c, do.Publish | do.Change)]
    assert [c.table for c in hook_tables] == [TableId.POLICY], "the SPD table stays"
    assert transcript.is_open()
    assert kinds(commands)[-1] is do.Adopted
    item = transcript.gate.negotiations.by_child[NAME]
    assert (item.place, item.policy, item.coverage) == (1, "renamed", Coverage.COVERED)


def test_stricter_modes_are_set_first_and_laxer_ones_last() -> None:
    transcript = running(PROTECT, audit=True, deny=False)
    commands = reload(transcript, PROTECT, FIRST, audit=False, deny=True)
    modes = [c for c in commands if isinstance(c, do.SetModes)]
    assert [(m.audit, m.deny) for m in modes] == [(False, True), (False, True)]
    assert kinds(commands).index(do.SetModes) < kinds(commands).index(do.Change)

    commands = reload(transcript, PROTECT, audit=True, deny=False)
    modes = [c for c in commands if isinstance(c, do.SetModes)]
    assert [(m.audit, m.deny) for m in modes] == [(False, True), (True, False)]
    last = len(commands) - 1 - kinds(commands)[::-1].index(do.SetModes)
    assert last > kinds(commands).index(do.Change)


@pytest.mark.parametrize(
    ("audit", "text"),
    [(False, "protected flows are refused: no"), (True, "in audit mode nothing is refused: no")],
)
def test_the_loss_of_ike_is_said_with_what_it_means(audit: bool, text: str) -> None:
    commands = running(PROTECT, audit=audit).after(on.IkeGone(Problem("no")))
    assert [one.text for one in commands if isinstance(one, do.Log)] == [text]


def test_a_newly_protected_network_waits_for_its_source() -> None:
    """Until then its covered flows would be refused, so the old configuration stays in force."""
    transcript = running(PROTECT)
    new = (PROTECT, Policy("more", (ELSEWHERE,)))
    commands = reload(transcript, *new)
    assert commands == [do.ResolvePaths((THERE, ELSEWHERE))]
    assert [policy.name for policy in transcript.gate.policies] == ["db"]
    flow = Flow(ip_address("10.3.0.1"), 6, 80, ip_address("10.1.0.1"))
    assert transcript.entry(TableId.POLICY, flow) is None

    assert do.Adopted() not in transcript.after(SOURCES), "this answers the earlier query"
    assert do.Adopted() not in transcript.after(connected())
    commands = transcript.after(BOTH)
    assert kinds(commands).index(do.SetPaths) < kinds(commands).index(do.Change)
    assert kinds(commands)[-1] is do.Adopted
    assert [policy.name for policy in transcript.gate.policies] == ["db", "more"]
    entry = transcript.entry(TableId.POLICY, flow)
    assert entry is not None
    assert entry.state is State.PROTECT


def test_the_route_of_a_network_no_longer_protected_is_not_followed() -> None:
    transcript = running(PROTECT, Policy("more", (ELSEWHERE,)))
    transcript.after(BOTH)
    assert do.ResolvePaths((THERE,)) in reload(transcript, PROTECT)


def test_a_negotiation_follows_its_policy_to_another_position() -> None:
    transcript = running(PROTECT)
    transcript.after(REFUSED)
    reload(transcript, FIRST, PROTECT, errnos=Errnos(negotiating=EACCES))
    entry = transcript.entry(TableId.POLICY, ROUTED)
    assert entry is not None
    assert entry.error == EACCES, "still negotiating, at its new position"
    bypassed = transcript.entry(TableId.POLICY, replace(ROUTED, daddr=ip_address("10.3.0.9")))
    assert bypassed is not None
    assert bypassed.error == EPERM
    transcript.after(on.NegotiationFailed(NAME, Cause("no")))
    entry = transcript.entry(TableId.POLICY, ROUTED)
    assert entry is not None
    assert entry.error == EHOSTUNREACH


@pytest.mark.parametrize(
    "policies",
    [
        (replace(PROTECT, action=Action.DISCARD),),
        (replace(PROTECT, child="other"),),
        (Policy("more", (ELSEWHERE,)),),
    ],
    ids=["discarded", "other-child", "no-policy"],
)
def test_a_negotiation_that_no_policy_asks_for_any_more_is_forgotten(
    policies: tuple[Policy, ...],
) -> None:
    transcript = running(PROTECT)
    transcript.after(REFUSED, on.NegotiationFailed(NAME, Cause("no")))
    reload(transcript, *policies)
    transcript.after(BOTH)
    assert not transcript.gate.negotiations.by_child
    timer, late = on.Timer("retry", NAME), on.NegotiationFailed(NAME, Cause("late"))
    assert initiated(transcript.after(on.TimerFired(timer), late)) == []


def test_a_refusal_from_before_the_reload_is_judged_by_the_new_policies() -> None:
    transcript = running(PROTECT)
    reload(transcript, FIRST, PROTECT)
    assert initiated(transcript.after(REFUSED)) == [NAME], "position 0 is a bypass now"
    assert transcript.gate.negotiations.by_child[NAME].policy == "db"


def test_without_configured_policies_the_loaded_connections_apply() -> None:
    transcript = running(replace(FIRST, action=Action.PROTECT))
    commands = reload(transcript)
    (resolve,) = (c for c in commands if isinstance(c, do.ResolvePaths))
    assert THERE in resolve.destinations
    commands = transcript.after(SOURCES)
    assert [p.remote for p in transcript.gate.policies] == [(THERE,)]
    assert kinds(commands)[-1] is do.Adopted


def test_without_policies_and_without_a_daemon_everything_is_protected() -> None:
    transcript = Transcript(Settings((FIRST,)))
    transcript.after(on.KernelSnapshot((), ()), on.IkeGone(Problem("no")))
    reload(transcript)
    transcript.after(
        on.PathsResolved(
            ((ip_network("0.0.0.0/0"), FlowPath(None)), (ip_network("::/0"), FlowPath(None)))
        )
    )
    for address in ("10.2.0.9", "10.3.0.9", "2001:db8::1"):
        entry = transcript.entry(TableId.POLICY, Flow(ip_address(address), 6, 80))
        assert entry is not None
        assert entry.state is State.PROTECT
    transcript.after(connected())
    assert transcript.entry(TableId.POLICY, FLOW) is not None
    assert transcript.entry(TableId.POLICY, Flow(ip_address("10.3.0.9"), 6, 80)) is None


# --- the controller ---------------------------------------------------------------------


async def test_a_configuration_that_cannot_be_read_is_not_adopted() -> None:
    adopted: list[Config] = []
    texts: Iterator[Config | UsageError] = iter(
        [UsageError("x.toml: policy[1].remote: must name at least one network"), Config()]
    )

    def read() -> Config:
        text = next(texts)
        if isinstance(text, UsageError):
            raise text
        return text

    async def adopt(config: Config) -> None:
        adopted.append(config)

    reload = Reload(read, adopt)
    with pytest.raises(UsageError, match="must name at least one network"):
        await reload.run()
    assert not adopted
    assert "must name at least one network" in reload.errors[0].text
    await reload.run()
    assert adopted == [Config()]
    assert reload.errors == []


@pytest.mark.parametrize(
    ("new", "key"),
    [
        (Config(vici=Path("/elsewhere")), "gate.vici"),
        (Config(settings=Settings(sa_source=SaSource.VICI)), "gate.sa_source"),
    ],
)
def test_a_setting_that_needs_a_restart_is_refused(new: Config, key: str) -> None:
    refuse_what_needs_a_restart(Path("f.toml"), Config(), Config(cgroups=("unit:x",)))
    with pytest.raises(UsageError, match=f"f.toml: {key}"):
        refuse_what_needs_a_restart(Path("f.toml"), Config(), new)
