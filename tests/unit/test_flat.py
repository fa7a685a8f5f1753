"""A step costs the same whatever the number of policies, SAs, negotiations and held calls.

Counted are the calls of functions, Python's and C's, that a step makes: no clock is read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from ipaddress import ip_address, ip_network
from types import FrameType
from typing import Any

import pytest

from ipsecgate.core.model import events as on
from ipsecgate.core.model.flow import FlowPath, Selector, TrafficSelector
from ipsecgate.core.model.ipsec import ESP, ChildName, ChildSa, SaId, SpdKey
from ipsecgate.core.model.policy import Policy, Settings
from ipsecgate.core.model.problem import Cause
from tests.unit.transcript import FLOW, HERE, LISTED, NET, REFUSED, SA, TRAP, Transcript

FEW, MANY = 40, 640
HIGHEST = 1.25  # times as many calls with MANY as with FEW: dictionaries and sets call, too


def network(number: int) -> Any:
    return ip_network((int(ip_address("10.2.0.0")) + (number << 8), 24))


def peer(number: int) -> Any:
    return ip_address("192.0.2.2") + number


def policy(number: int, spi: int) -> Any:
    template = replace(TRAP.templates[0], reqid=number + 1, spi=spi, daddr=peer(number))
    return replace(TRAP, key=SpdKey(Selector(HERE, network(number))), templates=(template,))


def sa(number: int, spi: int) -> Any:
    return replace(SA, id=SaId(peer(number), spi, ESP), reqid=number + 1)


def child(number: int) -> ChildSa:
    return replace(
        LISTED, name=ChildName("peer", f"net-{number}"), reqid=number + 1, spi_out=0x1000 + number,
        spi_in=0x1000 + number, remote_host=peer(number),
        remote=(TrafficSelector(network(number)),),
    )  # fmt: skip


def hub(count: int) -> Transcript:
    """A gate with so many peers: an SA with every other one, a held call for the rest."""
    policies = tuple(Policy(f"p{n}", (network(n),)) for n in range(count))
    transcript = Transcript(Settings(policies=policies))
    up = range(0, count, 2)
    transcript.after(
        on.KernelSnapshot(
            tuple(policy(n, 0x1000 + n if n % 2 == 0 else 0) for n in range(count)),
            tuple(sa(n, 0x1000 + n) for n in up),
        ),
        on.IkeConnected(
            tuple(
                replace(
                    NET, name=ChildName("peer", f"net-{n}"), remote=(TrafficSelector(network(n)),)
                )
                for n in range(count)
            ),
            tuple(child(n) for n in up),
            42,
        ),
        on.PathsResolved(
            tuple((network(n), FlowPath(ip_address("10.1.0.1"))) for n in range(count))
        ),
    )
    settle(transcript)
    for number in range(1, count, 2):
        flow = replace(FLOW, daddr=network(number)[9])
        transcript.after(on.CallMade(on.Call(1, number), flow, pid=number, limit=30.0))
    settle(transcript)
    transcript.after(on.SaGone(sa(0, 0x1000).id))  # some indexes are made when first needed
    return transcript


def settle(transcript: Transcript) -> None:
    while transcript.gate.has_more:
        transcript.after_together()


def calls(work: Callable[[], object]) -> int:
    """Return how many functions are called."""
    count = 0

    def profile(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def refused(number: int) -> on.FlowRefused:
    return replace(REFUSED, flow=replace(FLOW, daddr=network(number)[10]), policy=number)


STEPS: dict[str, Callable[[int], Iterable[on.Event]]] = {
    "an SA is deleted": lambda n: [on.SaGone(sa(n, 0x1000 + n).id)],
    "an SA is replaced": lambda n: [
        on.SaSet(sa(n, 0x9000)),
        on.PolicySet(policy(n, 0x9000)),
        on.ChildUp(replace(child(n), spi_out=0x9000, spi_in=0x9000)),
        on.SaGone(sa(n, 0x1000 + n).id),
    ],
    "a policy is deleted": lambda n: [on.PolicyGone(policy(n, 0).key)],
    "an SA comes up for which a call waits": lambda n: [
        on.SaSet(sa(n + 1, 0x9001)), on.PolicySet(policy(n + 1, 0x9001)),
    ],
    "a covered flow was refused": lambda n: [refused(n)],
    "a flow that is being negotiated is refused again": lambda n: [refused(n + 1)],
    "a call is made for a covered flow": lambda n: [
        on.CallMade(on.Call(2, 1), refused(n).flow, pid=1, limit=30.0)
    ],
    "a call is made for a flow that is being negotiated": lambda n: [
        on.CallMade(on.Call(2, 1), refused(n + 1).flow, pid=1, limit=30.0)
    ],
    "a negotiation fails": lambda n: [
        on.NegotiationFailed(ChildName("peer", f"net-{n + 1}"), Cause("no proposal chosen"))
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def hubs() -> dict[int, Transcript]:
    return {count: hub(count) for count in (FEW, MANY)}


@pytest.mark.parametrize("step", STEPS)
def test_a_step_costs_the_same_whatever_the_size(step: str, hubs: dict[int, Transcript]) -> None:
    counted = {}
    for count, transcript in hubs.items():
        number = 2 * list(STEPS).index(step) + 4  # each step has a peer of its own
        events = list(STEPS[step](number))
        counted[count] = calls(lambda t=transcript, e=events: t.gate.step(*e))  # type: ignore[misc]
    assert counted[MANY] <= counted[FEW] * HIGHEST, counted


def test_the_count_sees_work_that_grows() -> None:
    """What keeps the test above from passing for no reason."""
    few, many = (calls(lambda n=n: [abs(x) for x in range(n)]) for n in (FEW, MANY))  # type: ignore[misc]
    assert many > few * 10


def test_a_list_of_connections_that_shows_nothing_new_costs_the_same_whatever_its_size() -> None:
    def again(count: int) -> int:
        children = tuple(
            replace(NET, name=ChildName("peer", f"net-{n}"), remote=(TrafficSelector(network(n)),))
            for n in range(count)
        )
        listed = on.IkeConnected(children, (), 42)
        transcript = Transcript(Settings())
        transcript.after(on.KernelSnapshot((), ()), listed)
        settle(transcript)
        return calls(lambda: transcript.gate.step(replace(listed, children=(*children,))))

    few = again(FEW)
    assert few
    assert again(MANY) <= HIGHEST * few
