"""The journal behind `ipsecgate events`: numbered, bounded, refusals are receipts."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest

from ipsecgate.admin.event_documents import LogMessage, Receipt, Update
from ipsecgate.controller.callers import Caller
from ipsecgate.controller.journal import SIZE, Journal
from ipsecgate.controller.receipts import FLOWS_OF_PROGRAM, OPEN, RECEIPTS, WINDOW
from ipsecgate.core.gate import commands as do
from ipsecgate.core.model.events import FlowRefused
from ipsecgate.core.model.flow import TCP, Flow
from ipsecgate.core.model.ipsec import ChildName
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.tables.layout import EXPLAINED, Reason
from tests.typed_document import mismatches
from tests.unit.transcript import SA

FLOW = Flow(ip_address("10.2.0.9"), TCP, 5432)
POLICIES = (Policy("db", (), origin="/etc/p.toml:3"), Policy("peer/net#1", (), derived=True))
REFUSED = FlowRefused(FLOW, Reason.REFUSE_UNCOVERED, 0, 7, "psql", 1, at=1000.0)
POSTGRES = Caller("/sys/fs/cgroup/system.slice/postgresql.service", "postgresql.service", "")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def journal(clock: Clock) -> Journal:
    return Journal(clock, lambda _refusal: ("peer/net", ""))


class Lines(logging.Handler):
    """What is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.fields: list[dict[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
        self.fields.append(getattr(record, "fields", {}))


@pytest.fixture
def logged() -> Iterator[Lines]:
    logger, lines = logging.getLogger("ipsecgate"), Lines()
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(lines)
    yield lines
    logger.removeHandler(lines)
    logger.setLevel(before)


def records(journal: Journal, kind: str = "", seq: int = 0) -> list[Any]:
    return [one for one in journal.since(seq) if kind in ("", one["kind"])]


def put(journal: Journal, refusal: FlowRefused = REFUSED, caller: Caller = POSTGRES) -> None:
    journal.refusal(refusal, POLICIES, audit=False, caller=caller)


def log(journal: Journal, text: str, **fields: str) -> None:
    record = logging.LogRecord("ipsecgate", logging.WARNING, "", 0, text, (), None)
    record.fields = fields
    journal.handle(record)


def covered(flow: Flow = FLOW) -> do.Covered:
    return do.Covered(flow, "db", 1000.0, ChildName("peer", "net"), SA)


def to(number: int) -> FlowRefused:
    """Return the refusal of a flow to another address."""
    return replace(REFUSED, flow=replace(FLOW, daddr=ip_address("10.3.0.0") + number))


def test_a_reader_gets_the_records_after_its_last_one_and_can_see_a_gap(journal: Journal) -> None:
    assert journal.since(0) == []
    for number in range(SIZE + 10):
        log(journal, str(number))
    assert [r["text"] for r in records(journal, seq=SIZE + 8)] == [str(SIZE + 8), str(SIZE + 9)]
    assert len(journal.since(0)) == SIZE
    assert journal.since(0)[0]["seq"] == 11
    assert records(journal)[0]["level"] == "warning"


def test_a_receipt_says_who_what_by_which_policy_and_why(journal: Journal) -> None:
    put(journal)
    put(journal, replace(REFUSED, reason=Reason.BLOCK_CLEAR, policy=1, pid=0, comm=""))
    put(journal, replace(REFUSED, reason=Reason.REFUSE_DEFAULT, policy=None))
    refused, blocked, default = records(journal)
    for record in (refused, blocked, default):
        assert mismatches(record, Receipt) == []
    assert (refused["kind"], refused["policy"], refused["pid"]) == ("refused", "db", 7)
    assert (refused["flow"], refused["text"]) == ("tcp 10.2.0.9:5432", "no live SA protects it")
    assert (refused["unit"], refused["container"]) == ("postgresql.service", None)
    assert (refused["origin"], refused["child"]) == ("/etc/p.toml:3", "peer/net")
    assert (blocked["kind"], blocked["pid"], blocked["comm"]) == ("blocked", None, None)
    assert blocked["origin"] == "connection peer/net"
    assert (default["policy"], default["origin"], default["child"]) == (None, None, None)


def test_every_reason_that_an_event_can_have_is_explained() -> None:
    assert EXPLAINED.keys() == {
        reason for reason in Reason if reason.name.startswith(("REFUSE", "BLOCK"))
    }


def test_attempts_at_one_flow_share_a_receipt_that_counts_what_the_hooks_did_not_tell(
    journal: Journal, clock: Clock
) -> None:
    for number in range(100):
        flow = replace(FLOW, sport=40000 + number)
        put(journal, replace(REFUSED, flow=flow, pid=number + 1, untold=9))
    put(journal, replace(REFUSED, flow=replace(FLOW, dport=81)))
    put(journal)
    first, second = records(journal)
    assert (first["count"], second["count"]) == (1001, 1)
    assert (first["dport"], second["dport"], first["pid"]) == (5432, 81, 1)
    assert journal.last_refusal == first["seq"]
    clock.now += WINDOW
    journal.tell_repeats()
    (again,) = records(journal, "again")
    assert mismatches(again, Update) == []
    assert again["text"] == "again, 991 times in 60 s", "of the first event's ten, none is new"
    assert (again["of"], again["count"], again["policy"]) == (first["seq"], 1001, "db")
    clock.now += WINDOW
    journal.tell_repeats()
    put(journal, replace(REFUSED, at=clock.now))
    assert len(records(journal, "refused")) == 3, "after a quiet minute it is told in full"


def test_a_receipt_is_completed_when_an_sa_protects_its_flow(
    journal: Journal, clock: Clock, logged: Lines
) -> None:
    put(journal)
    put(journal, replace(REFUSED, comm="pg_isready", at=1000.05))
    clock.now += 0.087
    journal.covered(covered())
    journal.covered(covered())
    first, second, *news = records(journal)
    assert (first["covered_after"], second["covered_after"]) == pytest.approx((0.087, 0.037))
    assert (first["spi"], first["reqid"], first["child"]) == ("c0ffee01", 1, "peer/net")
    assert [one["of"] for one in news] == [first["seq"], second["seq"]]
    assert all(mismatches(one, Update) == [] for one in news)
    assert logged.texts == [
        "refused tcp 10.2.0.9:5432 of psql (pid 7, postgresql.service): no live SA protects it; "
        "policy db",
        "refused tcp 10.2.0.9:5432 of pg_isready (pid 7, postgresql.service): no live SA protects "
        "it; policy db",
        *(
            f"tcp 10.2.0.9:5432 is covered by peer/net, {ms} ms after the first refusal, "
            "SPI c0ffee01, reqid 1"
            for ms in (87, 37)
        ),
    ]
    assert [one["event"] for one in logged.fields] == ["refused", "refused", "covered", "covered"]
    assert {one["policy"] for one in logged.fields} == {"db"}
    assert logged.fields[2]["covered_after"].startswith("0.08")


def test_only_a_refusal_after_it_was_covered_begins_another_receipt(
    journal: Journal, clock: Clock
) -> None:
    put(journal)
    clock.now += 1
    journal.covered(covered())
    put(journal, replace(REFUSED, at=1000.9))  # was in the ring buffer meanwhile
    assert [one["count"] for one in records(journal, "refused")] == [2]
    put(journal, replace(REFUSED, at=1001.1))
    assert [one["count"] for one in records(journal, "refused")] == [2, 1]
    assert [one["covered_after"] for one in records(journal, "refused")] == [1.0, None]


def test_a_failed_negotiation_is_the_cause_of_the_receipts_that_wait_for_it(
    journal: Journal,
) -> None:
    put(journal)
    log(journal, "x", event="failed", child="other/net", cause="no")
    assert records(journal)[0]["cause"] is None
    log(journal, "x", event="failed", child="peer/net", cause="AUTHENTICATION_FAILED")
    receipt, *messages = records(journal)
    assert receipt["cause"] == "AUTHENTICATION_FAILED"
    assert all(mismatches(one, LogMessage) == [] for one in messages)


def test_many_flows_of_a_program_share_a_receipt_and_others_keep_theirs(
    journal: Journal, logged: Lines
) -> None:
    put(journal, replace(REFUSED, comm="curl"))
    for number in range(10_000):
        put(journal, to(number))
    put(journal, replace(REFUSED, comm="wget"))
    found = records(journal)
    scopes = ["flow", *FLOWS_OF_PROGRAM * ["flow"], "program", "flow"]
    assert [one["scope"] for one in found] == scopes
    assert sum(one["count"] for one in found) == 10_002, "none is lost"
    assert len(logged.texts) == len(found)
    assert "and other flows of the same program" in logged.texts[-2]


def test_many_programs_share_a_receipt(journal: Journal, clock: Clock) -> None:
    for minute in range(10):
        for number in range(1000):
            put(journal, replace(to(number), comm=f"{minute}-{number}", at=clock.now))
        journal.tell_repeats()
        clock.now += WINDOW
    found = records(journal, "refused")
    assert len(found) <= 10 * (RECEIPTS + 1)
    assert found[-1]["scope"] != "program"
    assert {one["scope"] for one in found} == {"flow", "all"}
    assert sum(one["count"] for one in found) == 10_000
    assert len(journal._receipts._open) <= OPEN


def test_a_receipt_that_goes_on_outlasts_what_pushes_it_out(journal: Journal, clock: Clock) -> None:
    put(journal)
    for number in range(SIZE):
        log(journal, str(number))
    assert records(journal, "refused") == []
    put(journal)
    clock.now += WINDOW
    journal.tell_repeats()
    (receipt,) = records(journal, "refused")
    assert (receipt["count"], journal.last_refusal) == (2, 1)
    put(journal, replace(REFUSED, at=clock.now))
    assert journal.last_refusal == receipt["seq"]


def test_the_counts_that_are_left_at_the_end_are_logged(journal: Journal, logged: Lines) -> None:
    for _ in range(3):
        put(journal)
    journal.end()
    assert logged.texts[1:] == ["tcp 10.2.0.9:5432: no live SA protects it; again, 2 times in 0 s"]
