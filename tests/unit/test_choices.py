"""Children that cannot simply be asked for: wildcards, several gateways, narrowed ones."""

from __future__ import annotations

from dataclasses import replace
from errno import EHOSTUNREACH
from ipaddress import ip_address, ip_network

import pytest

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.coverage import Coverage
from ipsecgate.core.gate.explanation import explain
from ipsecgate.core.gate.gate import Gate
from ipsecgate.core.gate.kernel_steps import Step
from ipsecgate.core.gate.negotiations import LIMIT, LIMIT_WITH_NEXT, PARTS
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import Flow, FlowPath, Selector, TrafficSelector
from ipsecgate.core.model.ipsec import (
    ESP,
    Acquire,
    ChildConfig,
    ChildName,
    Mode,
    SaId,
    SpdKey,
    Template,
)
from ipsecgate.core.model.policy import Policy, Settings
from ipsecgate.core.model.problem import Cause
from ipsecgate.core.tables.layout import TableId
from tests.unit.transcript import (
    FLOW,
    HERE,
    LISTED,
    NAME,
    NET,
    PINNED,
    REFUSED,
    ROUTED,
    SA,
    SOURCES,
    THERE,
    TRAP,
    UP,
    Transcript,
    initiated,
)

CALL = on.CallMade(on.Call(1, 1), FLOW, 9, 30.0)


def coverage(gate: Gate, name: ChildName) -> Coverage:
    return gate.negotiations.coverage(name)


def answers(commands: list[do.Command]) -> list[int | None]:
    return [command.error for command in commands if isinstance(command, do.Answer)]


def logged(commands: list[do.Command]) -> list[str]:
    return [command.text for command in commands if isinstance(command, do.Log)]


# --- wildcards ----------------------------------------------------------------------------

MESH = ChildConfig(
    ChildName("mesh", "any"), Mode.TRANSPORT, (), (TrafficSelector(THERE),), wildcard=True
)
MESH_TRAP = replace(
    TRAP,
    key=SpdKey(Selector(ip_network("0.0.0.0/0"), THERE)),
    templates=(Template(ESP, Mode.TRANSPORT, reqid=1),),
)
OTHER = replace(FLOW, daddr=ip_address("10.2.0.10"))


def peer(flow: Flow = FLOW) -> ChildName:
    return MESH.name._replace(part=ip_network(flow.daddr))


@pytest.fixture
def mesh() -> Transcript:
    transcript = Transcript()
    loaded = on.IkeConnected((MESH,), (), pid=42)
    transcript.after(on.KernelSnapshot((MESH_TRAP,), ()), loaded, SOURCES)
    return transcript


def test_each_peer_of_a_wildcard_is_negotiated_with_by_itself(mesh: Transcript) -> None:
    commands = mesh.after(REFUSED)
    acquire = Acquire(ROUTED, MESH_TRAP.templates[0])
    assert do.Initiate(peer(), LIMIT, acquire) in commands
    assert initiated(mesh.after(REFUSED, replace(REFUSED, flow=replace(FLOW, dport=81)))) == []
    assert initiated(mesh.after(replace(REFUSED, flow=OTHER))) == [peer(OTHER)]

    mesh.after(on.NegotiationFailed(peer(OTHER), Cause("silent")))
    assert coverage(mesh.gate, peer(OTHER)) is Coverage.BACK_OFF
    assert coverage(mesh.gate, peer()) is Coverage.NEGOTIATING
    assert ROUTED.saddr is not None
    sa = replace(SA, id=SaId(FLOW.daddr, 5, ESP), saddr=ROUTED.saddr, mode=Mode.TRANSPORT)
    host = replace(
        MESH_TRAP,
        key=SpdKey(Selector(ip_network(str(ROUTED.saddr)), ip_network(FLOW.daddr))),
        priority=MESH_TRAP.priority - 1,
        templates=(replace(MESH_TRAP.templates[0], spi=5),),
    )
    mesh.after(on.SaSet(sa), on.PolicySet(host))
    assert mesh.is_open(ROUTED)
    assert not mesh.is_open(replace(ROUTED, daddr=OTHER.daddr))
    assert coverage(mesh.gate, peer()) is Coverage.COVERED


def test_held_calls_end_with_their_own_peer_s_failure(mesh: Transcript) -> None:
    other = replace(CALL, call=on.Call(1, 2), flow=OTHER)
    mesh.after(CALL, other)
    assert answers(mesh.after(on.NegotiationFailed(peer(OTHER), Cause("silent")))) == [EHOSTUNREACH]
    assert list(mesh.gate.holds.calls) == [CALL.call]


def test_a_wildcard_without_a_trap_fails_and_says_what_to_do(mesh: Transcript) -> None:
    mesh.after(on.PolicyGone(MESH_TRAP.key))
    commands = mesh.after(REFUSED)
    assert initiated(commands) == []
    assert any("Next: set `start_action = trap` for mesh/any" in text for text in logged(commands))
    assert coverage(mesh.gate, peer()) is Coverage.BACK_OFF
    assert answers(mesh.after(CALL)) == [EHOSTUNREACH]
    mesh.after(on.PolicySet(MESH_TRAP), on.TimerFired(on.Timer("retry", peer())))
    assert initiated(mesh.after(REFUSED)) == [peer()]


def test_a_policy_with_start_asks_for_no_peer_of_a_wildcard() -> None:
    policy = Policy("mesh", (THERE,), child="any", start=True)
    transcript = Transcript(Settings(policies=(policy,)))
    loaded = on.IkeConnected((MESH,), (), pid=42)
    commands = transcript.after(on.KernelSnapshot((MESH_TRAP,), ()), SOURCES, loaded)
    assert initiated(commands) == []
    assert initiated(transcript.after(REFUSED)) == [peer()]


def test_the_peers_that_are_remembered_are_limited(mesh: Transcript) -> None:
    flows = [replace(FLOW, daddr=THERE[number]) for number in range(1, PARTS + 2)]
    for flow in flows[:-1]:
        assert initiated(mesh.after(replace(REFUSED, flow=flow))) == [peer(flow)]
    commands = mesh.after(replace(REFUSED, flow=flows[-1]))
    assert initiated(commands) == []
    assert logged(commands) == [f"not negotiated, as {PARTS} peers are already: {flows[-1]}"]
    mesh.after(on.NegotiationFailed(peer(flows[7]), Cause("silent")))
    mesh.after(on.TimerFired(on.Timer("retry", peer(flows[7]))))
    assert initiated(mesh.after(replace(REFUSED, flow=flows[-1]))) == [peer(flows[-1])]
    assert len(mesh.gate.negotiations.by_child) == PARTS


# --- two gateways -------------------------------------------------------------------------

SECOND = replace(NET, name=ChildName("second", "net"))
RETRY, LIMIT_OF_SECOND = on.Timer("retry", NAME), on.Timer("limit", SECOND.name)


@pytest.fixture
def gateways() -> Transcript:
    transcript = Transcript()
    loaded = on.IkeConnected((NET, SECOND), (), pid=42)
    transcript.after(on.KernelSnapshot((TRAP,), ()), loaded, SOURCES)
    return transcript


def test_the_second_gateway_is_tried_when_the_first_fails(gateways: Transcript) -> None:
    assert do.Initiate(NAME, LIMIT_WITH_NEXT) in gateways.after(CALL)
    commands = gateways.after(on.NegotiationFailed(NAME, Cause("silent")))
    assert do.Initiate(SECOND.name, LIMIT) in commands
    assert answers(commands) == [], "the call waits for the second"
    assert initiated(gateways.after(REFUSED)) == []
    commands = gateways.after(*UP)
    assert answers(commands) == [None]
    assert coverage(gateways.gate, NAME) is Coverage.BACK_OFF
    assert coverage(gateways.gate, SECOND.name) is Coverage.COVERED


def test_the_first_is_asked_again_after_its_back_off_and_only_if_needed(
    gateways: Transcript,
) -> None:
    gateways.after(CALL, on.NegotiationFailed(NAME, Cause("silent")), *UP)
    assert initiated(gateways.after(on.TimerFired(RETRY))) == []
    assert coverage(gateways.gate, NAME) is Coverage.UNCOVERED, "the second's SA is not its own"
    assert initiated(gateways.after(CALL, REFUSED)) == []
    gateways.after(on.SaGone(SA.id), on.PolicySet(TRAP))
    assert coverage(gateways.gate, SECOND.name) is Coverage.UNCOVERED
    assert initiated(gateways.after(REFUSED)) == [NAME]
    gateways.after(*UP)
    assert coverage(gateways.gate, NAME) is Coverage.COVERED
    assert coverage(gateways.gate, SECOND.name) is Coverage.UNCOVERED


def test_the_second_stays_in_use_while_the_first_backs_off(gateways: Transcript) -> None:
    gateways.after(CALL, on.NegotiationFailed(NAME, Cause("silent")), *UP)
    gateways.after(on.SaGone(SA.id), on.PolicySet(TRAP))
    assert initiated(gateways.after(REFUSED)) == [SECOND.name]


def test_calls_fail_when_both_have_failed(gateways: Transcript) -> None:
    """Even if the first one's back-off ends meanwhile: a call would wait for them in turn."""
    gateways.after(CALL, on.NegotiationFailed(NAME, Cause("silent")))
    commands = gateways.after(on.TimerFired(RETRY))
    assert [c.timer for c in commands if isinstance(c, do.StartTimer)] == [RETRY]
    commands = gateways.after(on.TimerFired(LIMIT_OF_SECOND))
    assert answers(commands) == [EHOSTUNREACH]
    assert initiated(commands) == []
    assert gateways.errno == EHOSTUNREACH
    assert initiated(gateways.after(on.TimerFired(RETRY), REFUSED)) == [NAME]


def test_why_names_every_gateway_and_its_last_error(gateways: Transcript) -> None:
    gateways.after(REFUSED, on.NegotiationFailed(NAME, Cause("silent")))
    texts = [text for step, text in explain(gateways.gate, FLOW).steps if step is Step.IKE]
    assert texts == [
        "child second/net: negotiating, 1 attempt",
        "child peer/net: back-off, 1 attempt; last error: silent",
    ]


def test_a_narrower_child_is_no_second_gateway(gateways: Transcript) -> None:
    narrower = replace(SECOND, remote=(TrafficSelector(ip_network("10.2.0.0/24")),))
    gateways.after(on.IkeConnected((NET, narrower), (), pid=42))
    assert initiated(gateways.after(REFUSED)) == [SECOND.name]
    assert initiated(gateways.after(on.NegotiationFailed(SECOND.name, Cause("silent")))) == []


# --- narrowed children --------------------------------------------------------------------

ELSEWHERE = ip_network("10.3.0.0/16")
TWO = replace(NET, remote=(*NET.remote, TrafficSelector(ELSEWHERE)))
AWAY = replace(FLOW, daddr=ip_address("10.3.0.9"))
AWAY_TRAP = replace(TRAP, key=SpdKey(Selector(HERE, ELSEWHERE)))
PART = NAME._replace(part=ELSEWHERE)
CAUSE = "the peer accepted 10.2.0.0/16 of peer/net, not 10.3.0.0/16"


@pytest.fixture
def two() -> Transcript:
    transcript = Transcript()
    loaded = on.IkeConnected((TWO,), (), pid=42)
    here = FlowPath(ROUTED.saddr)
    sources = on.PathsResolved(((THERE, here), (ELSEWHERE, here)))
    transcript.after(on.KernelSnapshot((TRAP, AWAY_TRAP), ()), loaded, sources)
    return transcript


def test_what_the_peer_leaves_out_fails_and_the_rest_is_covered(two: Transcript) -> None:
    two.after(REFUSED, *UP, on.ChildUp(LISTED), on.NegotiationDone(NAME))
    assert coverage(two.gate, NAME) is Coverage.COVERED
    commands = two.after(replace(CALL, flow=AWAY))
    assert answers(commands) == [EHOSTUNREACH]
    assert initiated(commands) == [], "another CHILD_SA would be narrowed in the same way"
    assert [text for text in logged(commands) if CAUSE in text]
    assert coverage(two.gate, NAME) is Coverage.COVERED
    assert coverage(two.gate, PART) is Coverage.BACK_OFF

    again = two.after(on.TimerFired(on.Timer("retry", PART)), replace(REFUSED, flow=AWAY))
    assert logged(again) == [], "said once"
    assert coverage(two.gate, PART) is Coverage.BACK_OFF
    assert two.gate.negotiations.by_child[PART].attempts == 2


def test_the_flow_that_was_left_out_may_be_the_first(two: Transcript) -> None:
    assert initiated(two.after(replace(CALL, flow=AWAY))) == [NAME]
    two.after(*UP, on.ChildUp(LISTED))
    assert answers(two.after(on.NegotiationDone(NAME))) == [EHOSTUNREACH]
    assert coverage(two.gate, NAME) is Coverage.UNCOVERED
    assert coverage(two.gate, PART) is Coverage.BACK_OFF
    entry = two.entry(TableId.POLICY, AWAY)
    assert entry is not None
    assert entry.error == EHOSTUNREACH
    assert answers(two.after(CALL)) == [None], "the other network is covered"


def test_the_list_may_show_what_was_left_out_after_the_end(two: Transcript) -> None:
    two.after(replace(CALL, flow=AWAY), *UP, on.NegotiationDone(NAME))
    two.after(on.IkeConnected((TWO,), (LISTED,), pid=42))
    assert answers(two.after(on.TimerFired(on.Timer("limit", NAME)))) == [EHOSTUNREACH]
    assert CAUSE in str(two.gate.negotiations.by_child[PART].last_error)


def test_a_source_that_the_peer_left_out_is_named_as_such(two: Transcript) -> None:
    narrow = replace(LISTED, local=(TrafficSelector(ip_network("10.1.9.0/24")),))
    pinned = replace(PINNED, key=SpdKey(Selector(ip_network("10.1.9.0/24"), THERE)))
    two.after(REFUSED, on.SaSet(SA), on.PolicySet(pinned), on.ChildUp(narrow))
    two.after(on.NegotiationDone(NAME))
    whole = NAME._replace(part=THERE)
    cause = f"the peer accepted 10.1.9.0/24 as our side of peer/net, not {ROUTED.saddr}"
    assert two.gate.negotiations.by_child[whole].last_error == Cause(
        cause,
        f"bind the socket to an address in 10.1.9.0/24, or have the peer's remote_ts contain "
        f"{ROUTED.saddr}",
    )


def test_a_gateway_that_leaves_the_flow_out_has_a_second_tried(two: Transcript) -> None:
    second = replace(SECOND, remote=TWO.remote)
    two.after(on.IkeConnected((TWO, second), (), pid=42))
    two.after(REFUSED, *UP, on.ChildUp(LISTED))
    assert initiated(two.after(replace(CALL, flow=AWAY))) == [SECOND.name]
    assert coverage(two.gate, PART) is Coverage.BACK_OFF


def test_repeated_failures_are_logged_once_and_counted(trapped: Transcript) -> None:
    texts = []
    for _ in range(5):
        texts += logged(trapped.after(REFUSED, on.NegotiationFailed(NAME, Cause("silent"))))
        texts += logged(trapped.after(on.TimerFired(RETRY)))
    assert texts[0].endswith(f"negotiating for {FLOW}")
    assert "silent; retry in" in texts[1]
    assert len(texts) == 2
    assert (
        "wrong key"
        in logged(trapped.after(REFUSED, on.NegotiationFailed(NAME, Cause("wrong key"))))[0]
    )
    trapped.after(on.TimerFired(RETRY), REFUSED)
    assert logged(trapped.after(*UP))[-1].endswith("covers the flow) after 6 failures")
