"""The journal behind `ipsecgate events`: numbered, bounded, refusals explained."""

from __future__ import annotations

import logging
from ipaddress import ip_address

from ipsecgate.controller.journal import SIZE, Journal
from ipsecgate.core.model.events import FlowRefused
from ipsecgate.core.model.flow import TCP, Flow
from ipsecgate.core.model.policy import Policy
from ipsecgate.core.tables.layout import EXPLAINED, Reason

FLOW = Flow(ip_address("10.2.0.9"), TCP, 5432)
POLICIES = (Policy("db", ()),)


def log(journal: Journal, text: str) -> None:
    journal.handle(logging.LogRecord("ipsecgate", logging.WARNING, "", 0, text, (), None))


def test_a_reader_gets_the_records_after_its_last_one_and_can_see_a_gap() -> None:
    journal = Journal()
    assert journal.since(0) == []
    for number in range(SIZE + 10):
        log(journal, str(number))
    assert [record["text"] for record in journal.since(SIZE + 8)] == [str(SIZE + 8), str(SIZE + 9)]
    assert len(journal.since(0)) == SIZE
    assert journal.since(0)[0]["seq"] == 11
    assert journal.since(0)[0]["level"] == "warning"


def test_a_refusal_names_flow_process_policy_and_reason() -> None:
    journal = Journal()
    for reason, policy, pid in ((Reason.REFUSE_UNCOVERED, 0, 7), (Reason.BLOCK_CLEAR, 9, 0)):
        journal.refusal(FlowRefused(FLOW, reason, policy, pid, "curl", 1), POLICIES, audit=False)
    refused, blocked = journal.since(0)
    assert (refused["kind"], refused["policy"], refused["pid"]) == ("refused", "db", 7)
    assert (refused["flow"], refused["text"]) == ("tcp 10.2.0.9:5432", "no live SA protects it")
    assert (blocked["kind"], blocked["policy"], blocked["pid"]) == ("blocked", None, None)


def test_every_reason_that_an_event_can_have_is_explained() -> None:
    assert EXPLAINED.keys() == {
        reason for reason in Reason if reason.name.startswith(("REFUSE", "BLOCK"))
    }
