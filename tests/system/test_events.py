"""`ipsecgate events` on real hosts: receipts from the first refusal to the SA, and in a flood."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ipsecgate.admin.event_documents import DENIED, LogMessage, Receipt, Update
from ipsecgate.controller.receipts import FLOWS_OF_PROGRAM, RECEIPTS
from ipsecgate.edges.host import control
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.system import flood
from tests.system.caller import Caller
from tests.system.under_exec import PORT, stopped
from tests.typed_document import mismatches
from tests.until import wait_until

pytestmark = pytest.mark.second_guest

SPEC = ConnSpec("tunnel-4", "tunnel", 4)  # no trap: only a refusal has it negotiated
NAME = f"{SPEC.name}/{SPEC.child_name}"
NETWORK = "198.18.0.0/15"  # RFC 2544; nothing is there
RATE, SECONDS = 1000, 2
TYPES = {"log": LogMessage, "refused": Receipt, "blocked": Receipt}
ALLOWED_MIB = 2.0  # that a flood may add to the controller's memory


@pytest.fixture(scope="module")
def gate(cache: Path) -> Iterator[Gated]:
    with Lab("ipsecgate-test-events") as lab:
        policies = f"""
        [[policy]]
        name = "db"
        remote = ["{lab.b.address(SPEC)}"]
        [[policy]]
        name = "nowhere"
        remote = ["{NETWORK}"]
        """
        with Gated(lab, policies=policies, cache=cache) as made:
            lab.b.serve("tcp-server", PORT)
            yield made


@pytest.fixture
def service(gate: Gated) -> Path:
    """A cgroup that looks like a unit's."""
    cgroup: Path = gate.lab.cgroup(f"{gate.instance}/app/web.service")
    return cgroup


@pytest.fixture(autouse=True)
def loaded(gate: Gated) -> None:
    gate.lab.reset()
    gate.lab.load(SPEC)
    gate.wait_policy(SPEC.name)


def events(gate: Gated, *options: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(gate.cli("--json", "events", *options).stdout)
    for record in found:
        assert mismatches(record, TYPES[record["kind"]]) == []
    return found


def recorded(gate: Gated, after: int = 0) -> list[dict[str, Any]]:
    """Return the receipts after a number, without the CLI, which takes a second to start here."""
    with control.connected(gate.paths.control) as ask:
        found = ask("events", since=after)["events"]
    return [record for record in found if record["kind"] in DENIED]


def line_of(gate: Gated, text: str) -> int:
    lines = gate.config.read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def refusals(caller: Caller, to: str, gate: Gated) -> int:
    """Have a call refused; return how many the last receipt has counted so far."""
    assert caller("tcp", to, PORT) == "EPERM"
    return max((receipt["count"] for receipt in recorded(gate)), default=0)


def test_a_receipt_from_the_first_refusal_to_the_sa(gate: Gated, service: Path) -> None:
    lab, to = gate.lab, str(gate.lab.b.address(SPEC))
    before = gate.status()["counters"]["refused"]
    follow = gate.argv("--json", "events", "--follow", "--policy", "db", "--denied")
    follower = lab.a.popen(follow, stdout=subprocess.PIPE)
    caller = Caller(lab.a.namespace.path, service)
    try:
        with stopped(lab):
            # The hooks report a flow once in 100 ms; most of it must be told before the SA comes.
            wait_until(lambda: refusals(caller, to, gate) >= 20, "they are not counted")
            assert recorded(gate)[-1]["covered_after"] is None
        wait_until(lambda: caller("tcp", to, PORT) == "EINPROGRESS", "no SA came")
        assert follower.stdout is not None
        refused, covered = (json.loads(follower.stdout.readline()) for _ in range(2))
    finally:
        caller.close()
        follower.kill()
        follower.wait()
    assert mismatches(refused, Receipt) == []
    assert mismatches(covered, Update) == []
    assert (covered["kind"], covered["of"]) == ("covered", refused["seq"])

    (receipt,) = events(gate, "--denied", "--unit", "web", "--since", "1h")
    assert receipt["seq"] == refused["seq"]
    assert receipt["flow"] == f"tcp {to}:{PORT}"
    assert receipt["comm"].startswith("python")
    assert (receipt["cgroup"], receipt["unit"]) == (str(service), "web.service")
    assert receipt["origin"] == f"{gate.config}:{line_of(gate, 'db') - 1}"
    assert (receipt["reason"], receipt["cause"]) == ("refuse_uncovered", None)
    assert receipt["child"] == NAME
    (sa,) = [one for one in gate.status()["sas"] if one["child"] == NAME]
    assert (receipt["spi"], receipt["reqid"]) == (sa["spi"], sa["reqid"])
    # The hooks report a flow once in 100 ms, and how often it was refused in between.
    counted = gate.status()["counters"]["refused"] - before
    assert 0.5 * counted <= receipt["count"] <= counted
    assert receipt["last"] - receipt["time"] <= receipt["covered_after"] + 0.01
    assert receipt["covered_after"] == covered["covered_after"] > 0.05

    (waited,) = gate.ask()["time_to_covered"]
    assert (waited["policy"], waited["count"]) == ("db", 1)
    assert waited["sum"] == pytest.approx(receipt["covered_after"], abs=0.05)
    screen = gate.cli("events", "--policy", "db").stdout
    assert "python3" in screen
    assert f"by {NAME}, SPI {sa['spi']}" in screen
    log = gate.log.read_text()
    assert log.count(f"refused tcp {to}:{PORT} of python3") == 1
    assert log.count(f"tcp {to}:{PORT} is covered by {NAME}, ") == 1


def test_a_receipt_names_the_cause_that_ike_gives(gate: Gated, service: Path) -> None:
    lab, to = gate.lab, str(gate.lab.b.address(SPEC))
    lab.break_psk()
    caller = Caller(lab.a.namespace.path, service)
    assert caller("tcp", to, PORT + 1) == "EPERM"
    caller.close()

    wait_until(lambda: recorded(gate)[-1]["cause"], "no cause")
    receipt = recorded(gate)[-1]
    assert receipt["flow"] == f"tcp {to}:{PORT + 1}"
    assert "AUTH" in receipt["cause"].upper()
    assert receipt["child"] == NAME
    (failed,) = [
        one
        for one in events(gate, "--policy", "db")
        if one.get("fields", {}).get("event") == "failed"
    ]
    assert failed["fields"]["cause"] == receipt["cause"]
    assert (failed["level"], failed["fields"]["child"]) == ("warning", NAME)


def test_a_blocked_packet_names_the_unit_although_its_process_is_unknown(
    gate: Gated, service: Path
) -> None:
    lab, to = gate.lab, str(gate.lab.b.address(SPEC))
    caller = Caller(lab.a.namespace.path, service)
    with stopped(lab):
        assert caller("raw", to) == "EPERM"
        wait_until(lambda: recorded(gate)[-1]["kind"] == "blocked", "no receipt")
    caller.close()
    receipt = recorded(gate)[-1]
    assert (receipt["reason"], receipt["pid"], receipt["comm"]) == ("block_clear", None, None)
    assert (receipt["unit"], receipt["cgroup"]) == ("web.service", str(service))


@pytest.mark.parametrize(
    ("what", "most"),
    [("ports", 1), ("destinations", FLOWS_OF_PROGRAM + 1), ("programs", RECEIPTS + 1)],
)
def test_a_flood_is_bounded_and_every_refusal_is_counted(gate: Gated, what: str, most: int) -> None:
    lab, cgroup = gate.lab, gate.lab.cgroup(f"{gate.instance}/app/{what}")
    first = recorded(gate)[-1]["seq"]
    memory, lines = gate.memory(), gate.log.read_text().count("\n")
    command = [sys.executable, "-S", flood.__file__, what, NETWORK, str(RATE), str(SECONDS)]
    calls, refused = map(int, lab.a.run(command, cgroup=cgroup).stdout.split())
    assert refused == calls > RATE * SECONDS / 4

    def counted() -> int:
        return sum(one["count"] for one in ours())

    def ours() -> list[dict[str, Any]]:
        return [one for one in recorded(gate, first) if one["cgroup"] == str(cgroup)]

    # Of one flow, the hooks have not yet told the refusals after the last event.
    enough = 0.8 * refused if what == "ports" else refused
    wait_until(lambda: counted() >= enough, f"not all of {refused} are counted")
    assert counted() <= refused
    assert 1 <= len(ours()) <= most
    assert gate.log.read_text().count("\n") - lines <= most + 5
    assert gate.memory() - memory <= ALLOWED_MIB
