"""A deadlock: IKE waits for a name, and its lookup for IKE."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.explanation import explain
from ipsecgate.core.gate.name_lookups import is_lookup
from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import UDP, Flow
from ipsecgate.core.model.problem import Cause
from tests.unit.transcript import (
    FLOW,
    LISTED,
    NAME,
    REFUSED,
    SOURCES,
    TRAP,
    Transcript,
    connected,
)

QUERY = replace(FLOW, proto=UDP, dport=53)
LOOKUP = replace(REFUSED, flow=QUERY, pid=812, comm="unbound", unit="unbound.service")
FAILED = on.NegotiationFailed(NAME, Cause("no address", unresolved="gw.example"))
FIX = 'action = "bypass", remote = ["10.2.0.9"], protocol = "udp" and port = "53"'


@pytest.fixture
def waiting() -> Transcript:
    transcript = Transcript()
    transcript.after(on.KernelSnapshot((TRAP,), ()), connected(), SOURCES)
    return transcript


def logged(commands: list[do.Command]) -> list[str]:
    return [command.text for command in commands if isinstance(command, do.Log)]


def deadlocks(transcript: Transcript) -> list[str]:
    return [str(one) for one in transcript.gate.errors if "waits for the address" in one.text]


def test_the_deadlock_is_named_once_with_the_way_out_of_it(waiting: Transcript) -> None:
    commands = waiting.after(LOOKUP, FAILED)
    (error,) = deadlocks(waiting)
    assert error.startswith("connection peer waits for the address of gw.example, but policy peer/")
    assert "unbound (pid 812, unbound.service) at 10.2.0.9" in error
    assert FIX in error
    assert error in logged(commands)
    assert error not in logged(waiting.after(replace(LOOKUP, pid=813), FAILED)), "said already"
    assert FIX in explain(waiting.gate, QUERY).advice
    assert FIX not in explain(waiting.gate, FLOW).advice, "it is no lookup"


def test_it_ends_when_the_negotiation_gets_further(waiting: Transcript) -> None:
    failure = on.NegotiationFailed(NAME, Cause("MAC mismatched"))
    for end in (failure, on.NegotiationDone(NAME), on.ChildUp(LISTED)):
        waiting.after(LOOKUP, FAILED)
        assert deadlocks(waiting)
        waiting.after(end)
        assert not deadlocks(waiting)


@pytest.mark.parametrize(
    ("refusal", "failure"),
    [
        (REFUSED, FAILED),
        (LOOKUP, on.NegotiationFailed(NAME, Cause("the peer did not answer (5 retransmits)"))),
        (replace(LOOKUP, policy=None), FAILED),
    ],
    ids=["no lookup", "another cause", "not protected"],
)
def test_nothing_else_is_taken_for_one(
    waiting: Transcript, refusal: on.FlowRefused, failure: on.NegotiationFailed
) -> None:
    waiting.after(refusal, failure)
    assert not deadlocks(waiting)


def test_a_lookup_that_is_held_counts(waiting: Transcript) -> None:
    waiting.after(on.CallMade(on.Call(1, 2), QUERY, 812, 30.0), FAILED)
    (error,) = deadlocks(waiting)
    assert "the lookup by a process (pid 812) at" in error


def test_multicast_names_and_tls_count() -> None:
    ports = {port for port in range(6000) if is_lookup(replace(QUERY, dport=port))}
    assert ports == {53, 853, 5353}
    assert not is_lookup(Flow(QUERY.daddr, 1, 53))
