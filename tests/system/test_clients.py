"""Real, unmodified clients: held during a real negotiation, refused, or held in vain.

The servers are real daemons on the other host. A client was served if it exits with 0 and prints
what only its server knows. A capture between the hosts and the kernel's counter of retransmissions
are the evidence.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.catalogue import catalogue
from tests.clients.client_lab import ClientLab, End, client_lab

NAMES = [client.name for client in catalogue("", Path())]
SOME = ["psql", "Python asyncio", "node", "Java", "Go, static"]
SAYS_SO = (End.NAMED, End.VAGUE)


@pytest.fixture(scope="module")
def clients(cache: Path) -> Iterator[ClientLab]:
    with client_lab("ipsecgate-test-clients", cache) as made:
        yield made


@pytest.mark.parametrize("name", NAMES)
def test_a_refused_client_ends_and_reports_the_error(clients: ClientLab, name: str) -> None:
    """Without holding, the same client is refused at once."""
    outcome = clients.run(clients.forbidden[name])
    assert outcome.end("EPERM") in SAYS_SO, outcome
    assert outcome.refused
    assert not outcome.seen.clear
    assert not outcome.seen.esp


@pytest.mark.parametrize("name", NAMES)
def test_a_held_client_is_served(clients: ClientLab, name: str) -> None:
    """It calls before there is an SA and notices nothing: one call, no repeated SYN."""
    clients.without_sa()
    attempts = clients.attempts()
    outcome = clients.run(clients.to_net[name], hold="60s")
    assert outcome.served, outcome
    assert outcome.seen.ike, "a real negotiation"
    assert outcome.seen.esp
    assert not outcome.seen.clear
    assert outcome.retransmitted == 0
    assert outcome.held
    assert not outcome.refused, "its first call went through, not a second one"
    assert clients.attempts() == attempts + 1


@pytest.mark.parametrize("error", ["EHOSTUNREACH", "ETIMEDOUT"])
def test_a_client_held_until_the_limit_ends_and_reports_the_error(
    clients: ClientLab, error: str
) -> None:
    """Five clients; `make clients` runs all (docs/clients.md)."""
    outcomes = list(clients.unserved(error, SOME))
    assert len(outcomes) == len(SOME)
    for outcome in outcomes:
        assert outcome.end(error) in SAYS_SO, outcome
        assert not outcome.refused
        assert not outcome.seen.clear
        assert not outcome.seen.esp
