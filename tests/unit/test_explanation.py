"""Why a flow is let go or refused: the verdict is the tables', and each step names its cause."""

from __future__ import annotations

import random
from dataclasses import replace
from errno import EHOSTUNREACH, EPERM
from ipaddress import ip_address, ip_network

import pytest

from ipsecgate.controller.report import awaited
from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.explanation import explain, no_path
from ipsecgate.core.gate.kernel_steps import Step
from ipsecgate.core.gate.misfit import absent_children
from ipsecgate.core.gate.routing import Routed
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import (
    ANY_V4,
    ANY_V6,
    TCP,
    UDP,
    Flow,
    FlowPath,
    Selector,
    TrafficSelector,
)
from ipsecgate.core.model.ipsec import ESP, Action, SaId, SpdKey
from ipsecgate.core.model.policy import Policy, Settings
from ipsecgate.core.model.problem import Cause, Problem
from ipsecgate.core.tables.layout import Reason, State, TableId, flow_key
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
    connected,
)


def said(transcript: Transcript, step: Step, flow: Flow = FLOW) -> str:
    return "; ".join(text for of, text in explain(transcript.gate, flow).steps if of is step)


def test_before_the_first_call_everything_is_there_but_the_sa(trapped: Transcript) -> None:
    found = explain(trapped.gate, FLOW)
    assert (found.reason, found.error) == (Reason.REFUSE_UNCOVERED, EPERM)
    assert "derived from strongSwan's connections" in said(trapped, Step.POLICY)
    assert "chosen by routing" in said(trapped, Step.SOURCE)
    assert f"to {THERE}" in said(trapped, Step.KERNEL)
    assert f"none of reqid {TRAP.templates[0].reqid}" in said(trapped, Step.SA)
    assert said(trapped, Step.IKE) == f"child {NAME} was not asked for yet"


def test_a_covered_flow_names_its_sa(trapped: Transcript) -> None:
    trapped.after(REFUSED, *UP)
    found = explain(trapped.gate, FLOW)
    assert (found.reason, found.error, found.advice) == (Reason.ALLOW_COVERED, 0, "")
    assert said(trapped, Step.SA) == f"{SA.id}: live, and protects the flow"
    assert said(trapped, Step.IKE) == ""


def test_a_failed_negotiation_names_ikes_cause_and_the_errno(trapped: Transcript) -> None:
    trapped.after(REFUSED, on.NegotiationFailed(NAME, Cause("no proposal chosen")))
    found = explain(trapped.gate, FLOW)
    assert found.error == EHOSTUNREACH
    assert said(trapped, Step.IKE).endswith("back-off, 1 attempt; last error: no proposal chosen")
    assert f"--child {NAME.child}" in found.advice


def test_a_negotiation_under_way_is_said(trapped: Transcript) -> None:
    trapped.after(REFUSED)
    assert "negotiating" in said(trapped, Step.IKE)
    assert "the peer is up" in explain(trapped.gate, FLOW).advice


def test_a_child_that_nothing_asked_for_can_be_asked_for(trapped: Transcript) -> None:
    found = explain(trapped.gate, FLOW)
    assert said(trapped, Step.IKE).endswith("was not asked for yet")
    assert f"`ipsecgate up {NAME}`" in found.advice


def test_an_sa_that_the_daemon_does_not_list(trapped: Transcript) -> None:
    transcript = Transcript()
    transcript.after(on.KernelSnapshot((TRAP,), (SA,)), connected(), SOURCES)
    assert "strongSwan does not list it" in said(transcript, Step.SA)
    transcript.after(connected(LISTED))
    assert "protects the flow" in said(transcript, Step.SA)


def test_selectors_that_the_peer_narrowed(trapped: Transcript) -> None:
    elsewhere = replace(LISTED.remote[0], network=ip_network("10.2.9.0/24"))
    transcript = Transcript()
    transcript.after(
        on.KernelSnapshot((PINNED,), (SA,)),
        connected(replace(LISTED, remote=(elsewhere,))),
        SOURCES,
    )
    assert explain(transcript.gate, FLOW).reason is Reason.REFUSE_UNCOVERED
    assert "the peer agreed to do not contain the flow" in said(transcript, Step.SA)


def test_an_sa_of_another_spi_than_the_policy_names(trapped: Transcript) -> None:
    other = replace(SA, id=SaId(SA.id.daddr, 0x7777, ESP))
    trapped.after(on.PolicySet(PINNED), on.SaSet(other))
    assert f"the policy wants {SA.id.spi:08x}" in said(trapped, Step.SA)


@pytest.mark.parametrize(
    ("action", "text", "reason"),
    [
        (Action.BYPASS, "an exception of the connections", Reason.ALLOW_PASSED),
        (Action.DISCARD, "blocks the flow", Reason.REFUSE_UNCOVERED),
    ],
)
def test_a_kernel_policy_that_wins_and_does_not_protect(
    trapped: Transcript, action: Action, text: str, reason: Reason
) -> None:
    trapped.after(REFUSED, *UP)
    key = SpdKey(Selector(ANY_V4, ip_network("10.2.0.0/24")))
    first = replace(TRAP, key=key, priority=1, action=action, templates=())
    trapped.after(on.PolicySet(first))
    assert text in said(trapped, Step.KERNEL)
    assert explain(trapped.gate, FLOW).reason is reason


def test_policies_of_one_priority_are_all_shown(trapped: Transcript) -> None:
    twin = replace(TRAP, key=SpdKey(Selector(ANY_V4, THERE)), templates=())
    trapped.after(on.PolicySet(twin))
    assert "the kernel may use any" in said(trapped, Step.KERNEL)


def test_without_a_kernel_policy_daemon_or_route() -> None:
    transcript = Transcript()
    transcript.after(on.KernelSnapshot((), ()), connected(), SOURCES)
    assert "none matches" in said(transcript, Step.KERNEL)
    transcript.after(on.IkeGone(Problem("Connection refused", "start strongSwan")))
    assert "Connection refused" in said(transcript, Step.IKE)
    assert explain(transcript.gate, FLOW).advice == "start strongSwan"
    transcript.after(on.PathsResolved(((THERE, FlowPath(None)),)))
    assert explain(transcript.gate, FLOW).reason is Reason.REFUSE_NO_SOURCE


def configured(*policies: Policy, deny: bool = False) -> Transcript:
    return Transcript(Settings(policies=policies, deny=deny))


PROTECT = Policy("db", (THERE,), proto=TCP, ports=(5432, 5433), origin="/etc/x.toml:7")


def test_the_operators_policies() -> None:
    transcript = configured(
        Policy("printer", (ip_network("10.2.0.9/32"),), Action.BYPASS),
        Policy("none", (ip_network("10.2.0.8/32"),), Action.DISCARD),
        PROTECT,
        Policy("all", (ANY_V4, ANY_V6)),
    )
    transcript.after(on.KernelSnapshot((), ()), connected(), SOURCES)

    def about(host: str, port: int = 5432, proto: int = TCP) -> tuple[Reason, str]:
        flow = Flow(ip_address(host), proto, port)
        return explain(transcript.gate, flow).reason, said(transcript, Step.POLICY, flow)

    assert about("10.2.0.9")[0] is Reason.ALLOW_BYPASS
    assert about("10.2.0.8")[0] is Reason.REFUSE_DISCARD
    reason, text = about("10.2.0.7")
    assert reason is Reason.REFUSE_UNCOVERED
    assert text == f"db protects tcp {THERE} port 5432-5433 (/etc/x.toml:7)"
    assert about("10.2.0.7", 53, UDP)[1].startswith("all protects everything")
    assert about("127.0.0.1")[0] is Reason.ALLOW_EXEMPT


@pytest.mark.parametrize("deny", [False, True])
def test_no_policy_names_the_flow(deny: bool) -> None:
    transcript = configured(PROTECT, deny=deny)
    transcript.gate.start()
    found = explain(transcript.gate, Flow(ip_address("192.0.2.77"), TCP, 80))
    assert found.reason is (Reason.REFUSE_DEFAULT if deny else Reason.ALLOW_DEFAULT)
    assert bool(found.advice) is deny


def test_no_policy_is_known_yet() -> None:
    transcript = configured()
    assert explain(transcript.gate, FLOW).reason is Reason.REFUSE_NOT_READY
    loopback = Flow(ip_address("::1"), TCP, 80)
    assert explain(transcript.gate, loopback).reason is Reason.ALLOW_EXEMPT


def test_a_policy_that_names_a_child_that_is_not_loaded() -> None:
    transcript = configured(replace(PROTECT, child="nowhere", ports=(0, 0xFFFF)))
    transcript.after(on.KernelSnapshot((), ()), connected(), SOURCES)
    assert said(transcript, Step.IKE) == (
        "policy db (/etc/x.toml:7) needs the child nowhere, which strongSwan has not loaded "
        "(loaded: peer/net)"
    )
    assert explain(transcript.gate, FLOW).advice.startswith("correct `child` of policy db")


@pytest.mark.parametrize(("written", "meant"), [("nett", "net"), ("peer/nat", "peer/net")])
def test_a_misspelt_child_is_named_alike_in_every_place(written: str, meant: str) -> None:
    """In `why`, the log, the records of refusals, and the errors of `status`."""
    transcript = configured(replace(PROTECT, child=written, ports=(0, 0xFFFF)))
    transcript.after(on.KernelSnapshot((), ()), connected(), SOURCES, REFUSED)
    text, advice = said(transcript, Step.IKE), explain(transcript.gate, FLOW).advice
    assert advice.startswith(f"did you mean {meant}? Then correct `child` of policy db")
    (told,) = [c.text for c in transcript.after(connected()) if isinstance(c, do.Log)]
    assert told == f"no loaded connection would protect {FLOW}: {text}. Next: {advice}"
    assert awaited(transcript.gate, FLOW) == (None, text)
    told_of = Problem(text, advice)
    assert absent_children(transcript.gate.ike.loaded, transcript.gate.policies) == [told_of]


def test_children_that_are_loaded_are_not_absent() -> None:
    transcript = configured(PROTECT, replace(PROTECT, name="named", child="peer/net"))
    transcript.after(on.KernelSnapshot((), ()), connected(), SOURCES)
    assert absent_children(transcript.gate.ike.loaded, transcript.gate.policies) == []


ELSEWHERE = ip_network("10.1.1.0/24")
OTHER_SOURCE = (
    f"the source {ROUTED.saddr} is not in the local selector {ELSEWHERE} (local_ts of {NAME})"
)


def test_a_source_outside_the_local_selector_of_a_child_that_is_up() -> None:
    """The kernel has the SA and its policy, so only the source does not fit."""
    local = (TrafficSelector(ELSEWHERE),)
    loaded = replace(connected(replace(LISTED, local=local)), children=(replace(NET, local=local),))
    key = SpdKey(Selector(ELSEWHERE, THERE))
    transcript = Transcript()
    transcript.after(on.KernelSnapshot((), ()), replace(loaded, established=()), SOURCES)
    assert said(transcript, Step.IKE) == f"child {NAME} was not asked for yet; {OTHER_SOURCE}"
    transcript.after(REFUSED, on.NegotiationDone(NAME), on.SaSet(SA))
    transcript.after(on.PolicySet(replace(PINNED, key=key)), loaded)
    transcript.after(on.TimerFired(on.Timer("limit", NAME)))
    assert said(transcript, Step.KERNEL) == (
        f"none matches: the nearest is {ELSEWHERE} to {THERE}, priority {PINNED.priority}, but the "
        f"source {ROUTED.saddr} is not in {ELSEWHERE}"
    )
    assert said(transcript, Step.IKE).endswith(f"strongSwan reports it as up, but {OTHER_SOURCE}")
    advice = explain(transcript.gate, FLOW).advice
    assert advice.startswith(f"the peer agrees with {ELSEWHERE}: change local_ts here")
    commands = transcript.after(on.TimerFired(on.Timer("retry", NAME)), REFUSED)
    assert [c.text for c in commands if isinstance(c, do.Log)] == [
        f"{NAME} is up but does not protect {FLOW}: {OTHER_SOURCE}"
    ]


def test_a_kernel_policy_for_another_port_is_the_nearest(trapped: Transcript) -> None:
    only = SpdKey(replace(TRAP.key.selector, proto=TCP, dport=443, dport_mask=0xFFFF))
    transcript = Transcript()
    transcript.after(on.KernelSnapshot((replace(TRAP, key=only),), ()), connected(), SOURCES)
    text = said(transcript, Step.KERNEL)
    assert f"the nearest is {HERE} to {THERE} proto 6 dport 443" in text
    assert text.endswith("but its protocol, port, mark or interface differs")


def test_the_verdict_is_that_of_the_published_tables(trapped: Transcript) -> None:
    """Random flows: whatever the steps say, the reason follows from what the hooks look up."""
    trapped.after(REFUSED, *UP)
    tables, rng, seen = trapped.gate.tables, random.Random(1), set()
    for _ in range(500):
        flow = Flow(
            ip_address(rng.choice(("10.2.0.5", "10.2.255.1", "10.3.0.1", "192.0.2.2"))),
            rng.choice((TCP, UDP)),
            rng.randrange(1, 0x10000),
            rng.choice((None, ip_address("10.1.0.1"), ip_address("10.9.0.1"))),
        )
        reason = explain(trapped.gate, flow).reason
        routed = trapped.gate.protection.routing.route(flow).flow
        named = tables[TableId.POLICY].classify(flow_key(flow)) is not None
        entry = tables[TableId.SPD].classify(flow_key(routed)) if routed.saddr else None
        live = entry is not None and entry.state is State.LIVE
        assert (reason in (Reason.REFUSE_UNCOVERED, Reason.REFUSE_NO_SOURCE)) is (
            named and not live
        )
        seen.add(reason)
    assert seen >= {Reason.ALLOW_COVERED, Reason.REFUSE_UNCOVERED, Reason.ALLOW_DEFAULT}


def test_a_failure_of_identity_names_the_one_that_is_expected(trapped: Transcript) -> None:
    known = replace(NET, peer_id="b.example", peer_auth="pre-shared key")
    trapped.after(on.IkeConnected((known,), (), pid=42))
    expected = "connection peer expects the peer to prove that it is b.example, by pre-shared key"
    trapped.after(REFUSED, on.NegotiationFailed(NAME, Cause("no proposal chosen")))
    assert expected not in said(trapped, Step.IKE), "it has nothing to do with identities"
    trapped.after(on.TimerFired(on.Timer("retry", NAME)), REFUSED)
    trapped.after(on.NegotiationFailed(NAME, Cause("no key", "add it", is_identity=True)))
    assert expected in said(trapped, Step.IKE)
    assert explain(trapped.gate, FLOW).advice == "add it"
    trapped.after(on.IkeConnected((replace(NET, peer_auth="public key"),), (), pid=42))
    assert expected not in said(trapped, Step.IKE), "the connection was loaded anew"


@pytest.mark.parametrize(
    ("flow", "text", "advice"),
    [
        (FLOW, "no way to this destination", "ip route get"),
        (
            Flow(ip_address("2001:db8:b::1"), TCP, 443, device=7),
            "or out of the device's VRF",
            "set `src` of the route to one of the VRF",
        ),
    ],
)
def test_a_source_that_is_not_known_has_its_mend(flow: Flow, text: str, advice: str) -> None:
    routed = Routed(flow, path=FlowPath(None), reason=Reason.REFUSE_NO_SOURCE)
    found = no_path(flow, routed)
    assert text in found.text
    assert advice in found.advice
