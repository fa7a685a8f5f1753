"""Children that the gate cannot simply ask for: two gateways for one network, and narrowed ones.

Host b is both gateways: its own address, and a second one that it has only while a test adds it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from ipsecgate.core.model.flow import Address
from ipsecgate.lab import traffic
from ipsecgate.lab.charon import HASTY
from ipsecgate.lab.connections import End, connection
from ipsecgate.lab.endpoints import Client, Report
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.system.caller import Caller, called_again, hammering
from tests.system.under_exec import PORT, nothing_in_clear, start
from tests.until import wait_until

pytestmark = pytest.mark.second_guest

FIRST = ip_address("192.0.2.77")
HERE, THERE = "198.51.100.0/24", "203.0.113.0/24"
HALVES = ("203.0.113.0/25", "203.0.113.128/25")
LEFT_OUT = ip_address("203.0.113.129")


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-gateways") as lab:
        lab.warm_up(modes=("tunnel",), families=(4,))
        lab.b.serve("tcp-server", PORT)
        yield lab


def load(
    lab: Lab, gate: Gated, name: str, peer: Address, start_action: str, offered: tuple[str, ...],
    accepted: tuple[str, ...], options: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Load a connection on host a, and one on host b that accepts only some of its networks."""
    spec = ConnSpec(name, "tunnel", options=options or {})
    here = f"{name}@a.example", lab.a.outer[4], (HERE,)
    there = f"{name}@b.example", peer
    lab.b.charon.load(connection(spec, End(*there, accepted), End(*here), "none"))
    lab.a.charon.load(connection(spec, End(*here), End(*there, offered), start_action))
    gate.wait_policy(name)


def load_gateways(
    lab: Lab, gate: Gated, start_action: str, options: Mapping[str, str] | None = None
) -> None:
    for name, peer in (("first", FIRST), ("second", lab.b.outer[4])):
        load(lab, gate, name, peer, start_action, (THERE,), (THERE,), options)


def held(lab: Lab, gate: Gated, to: Address) -> Report:
    command = traffic.command("tcp-client", "--to", str(to), "--port", str(PORT))
    return Client(start(lab, gate, command)).result()


def negotiations(gate: Gated) -> dict[str, dict[str, Any]]:
    return {n["child"].partition("/")[2]: n for n in gate.ask()["negotiations"]}


def states(gate: Gated) -> tuple[str, ...]:
    found = negotiations(gate)
    return tuple(found[name]["state"] for name in ("first", "second") if name in found)


@contextlib.contextmanager
def first_gateway(lab: Lab) -> Iterator[None]:
    """Have host b answer as the first gateway, too."""
    address = [f"{FIRST}/24", "dev", "eth0"]
    lab.b.run(["ip", "address", "add", *address])
    try:
        yield
    finally:
        lab.b.run(["ip", "address", "delete", *address])


@pytest.fixture
def hasty(lab: Lab) -> Iterator[None]:
    """Have strongSwan give up after 3 s."""
    lab.a.charon.configure(HASTY)
    yield
    lab.a.charon.configure("")


# --- two gateways -------------------------------------------------------------------------


@pytest.mark.parametrize("start_action", ["trap", "none"])
def test_the_second_gateway_is_tried_while_the_call_waits(
    lab: Lab, gate: Gated, start_action: str
) -> None:
    """strongSwan would try the first one for longer than the call may wait."""
    load_gateways(lab, gate, start_action)
    with nothing_in_clear(lab, esp=True):
        report = held(lab, gate, lab.b.inner[4])
    assert (report["error"], report["echoed"], report["attempts"]) == (None, True, 1)
    found = negotiations(gate)
    assert found["second"]["state"] == "covered"
    assert found["first"]["state"] in ("back-off", "uncovered")
    assert "silent" in found["first"]["last_error"]
    assert lab.a.established() == ("second",)


def test_a_refused_call_need_not_come_again_for_the_second_to_be_tried(
    lab: Lab, gate: Gated, hasty: None
) -> None:
    load_gateways(lab, gate, "trap")
    caller = Caller(lab.a.namespace.path, gate.cgroup)
    try:
        assert caller("tcp", str(lab.b.inner[4]), PORT) == "EPERM"
        wait_until(lambda: lab.a.established() == ("second",), "the second was not tried")
    finally:
        caller.close()


def test_the_first_gateway_is_used_again_when_it_works_and_nothing_flaps(
    lab: Lab, gate: Gated, hasty: None
) -> None:
    load_gateways(lab, gate, "trap")
    assert held(lab, gate, lab.b.inner[4])["error"] is None
    assert states(gate)[1] == "covered"
    wait_until(lambda: states(gate)[0] == "uncovered", "the first one's back-off never ends")
    attempts = negotiations(gate)["first"]["attempts"]
    with first_gateway(lab):
        # The second works, so the first one is left alone, however much is sent.
        with hammering(
            lab.a.namespace.path, gate.cgroup, "tcp", str(lab.b.inner[4]), PORT
        ) as results:
            called_again(results, 200)
        assert set(results) == {"EINPROGRESS"}
        assert negotiations(gate)["first"]["attempts"] == attempts
        lab.let_tcp_close()  # host b has no gate
        lab.a.charon.terminate("second")
        wait_until(lambda: states(gate)[1] == "uncovered", "the second is still up")
        with nothing_in_clear(lab, esp=True):
            report = held(lab, gate, lab.b.inner[4])
        assert (report["error"], report["attempts"]) == (None, 1)
        wait_until(lambda: states(gate) == ("covered", "uncovered"), "not back to the first")
        assert lab.a.established() == ("first",)
        lab.let_tcp_close()
        lab.a.charon.drop_all()


def test_when_the_established_gateway_dies_the_second_takes_over(
    lab: Lab, gate: Gated, hasty: None
) -> None:
    """strongSwan notices the death (DPD) and deletes the SA; then the next call is held."""
    # With MOBIKE the gateway would go on at its other address.
    load_gateways(lab, gate, "trap", {"dpd_delay": "1s", "mobike": "no"})
    with first_gateway(lab):
        assert held(lab, gate, lab.b.inner[4])["error"] is None
        assert lab.a.established() == ("first",)
        lab.let_tcp_close()
    wait_until(lambda: states(gate)[0] != "covered", "the death is not noticed")
    with nothing_in_clear(lab, esp=True):
        report = held(lab, gate, lab.b.inner[4])
    assert (report["error"], report["attempts"]) == (None, 1)
    assert lab.a.established() == ("second",)
    assert states(gate)[1] == "covered"


def test_when_all_gateways_are_silent_the_call_fails(lab: Lab, gate: Gated, hasty: None) -> None:
    load_gateways(lab, gate, "trap")
    lab.drop_ike()
    with nothing_in_clear(lab, esp=False):
        report = held(lab, gate, lab.b.inner[4])
    assert (report["error"], report["attempts"]) == ("EHOSTUNREACH", 1)
    found = negotiations(gate)
    for name in ("first", "second"):
        assert re.search("silent|did not answer", found[name]["last_error"]), found


# --- a child of which the peer accepts a part ---------------------------------------------


@pytest.mark.parametrize("start_action", ["trap", "none"])
@pytest.mark.parametrize("first", ["accepted", "left out"])
def test_what_the_peer_leaves_out_fails_with_the_cause_and_the_rest_works(
    lab: Lab, gate: Gated, first: str, start_action: str
) -> None:
    load(lab, gate, "halves", lab.b.outer[4], start_action, HALVES, HALVES[:1])

    def accepted_works() -> None:
        with nothing_in_clear(lab, esp=True):
            report = held(lab, gate, lab.b.inner[4])
        assert (report["error"], report["echoed"], report["attempts"]) == (None, True, 1)

    def left_out_fails() -> None:
        with nothing_in_clear(lab, esp=False):
            report = held(lab, gate, LEFT_OUT)
        assert report["error"] == "EHOSTUNREACH"

    order = [accepted_works, left_out_fails]
    for step in order if first == "accepted" else order[::-1]:
        step()
    accepted_works()
    cause = f"the peer accepted {HALVES[0]} of halves/halves, not {HALVES[1]}"
    assert cause in negotiations(gate)[f"halves to {HALVES[1]}"]["last_error"]
    assert lab.a.established() == ("halves",), "no second CHILD_SA"


def test_the_cause_is_logged_once_however_often_the_flow_is_asked_for(
    lab: Lab, cache: Path
) -> None:
    """The policies of the module's gate also name the networks of other tests, so not with it."""
    with Gated(lab, cache=cache) as gate:
        load(lab, gate, "halves", lab.b.outer[4], "trap", HALVES, HALVES[:1])
        to = str(LEFT_OUT)
        with hammering(lab.a.namespace.path, gate.cgroup, "tcp", to, PORT) as results:
            wait_until(lambda: "EHOSTUNREACH" in results, "it does not fail as negotiations do")
            wait_until(
                lambda: negotiations(gate)[f"halves to {HALVES[1]}"]["attempts"] > 3,
                "it is never tried again",
            )
            called_again(results, 500)
        assert set(results) == {"EPERM", "EHOSTUNREACH"}
        events = json.loads(gate.cli("--json", "events").stdout)
        logged = [e["text"] for e in events if e["kind"] == "log"]
        assert len([text for text in logged if "the peer accepted" in text]) == 1
        assert len([text for text in logged if "negotiating" in text]) == 1
        refused = [e for e in events if e["kind"] == "refused" and e["flow"] == f"tcp {to}:{PORT}"]
        assert len(refused) == 1, "it was refused hundreds of times"
