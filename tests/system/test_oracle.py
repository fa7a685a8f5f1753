"""The gate's verdict equals the kernel's own, on random SPDs and SADs; see `oracle`.

ORACLE_SEED and ORACLE_CASES choose another run or a longer one. The other tests check the oracle: a
gate that errs must be detected.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ipsecgate.core.model.events import KernelSnapshot
from ipsecgate.core.model.flow import FlowPath
from ipsecgate.core.model.ipsec import ESP, Action, Mark, Mode, Sa, SpdEntry, Template
from ipsecgate.edges.kernel.probe import has_esp
from tests.system.oracle.judge import WrongAnswerError
from tests.system.oracle.model import COVERED, REFUSED
from tests.system.oracle.run import run, settings
from tests.system.oracle.two_namespaces import TwoNamespaces, two_namespaces

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="missing: root"),
    pytest.mark.skipif(not has_esp(), reason="missing: ESP in the kernel"),
]

SEED, CASES = 1, 3000
# Enough for each of the mistakes below, with room.
CASES_TO_ERR = 15_000
SEEDS_TO_ERR = (3000, 1)  # few worlds show the rarest mistakes


@pytest.fixture(scope="module")
def namespaces(cache: Path) -> Iterator[TwoNamespaces]:
    with two_namespaces(cache) as place:
        yield place


def test_the_gate_never_opens_what_the_kernel_does_not_cover(namespaces: TwoNamespaces) -> None:
    seed, cases = settings(SEED, CASES)
    tally = run(namespaces, seed, cases, sys.stdout)
    kernel = {
        answer: sum(
            count for (_, kernel_answer), count in tally.answers.items() if kernel_answer == answer
        )
        for _, answer in tally.answers
    }
    if cases < CASES:
        return
    assert all(count > cases / 20 for count in kernel.values()), f"seldom seen: {kernel}"
    assert len(kernel) == 3
    assert tally.answers["live", COVERED] > cases / 10
    assert sum(tally.stricter.values()) < kernel[COVERED] / 2, "stricter is the exception"
    assert tally.full < tally.worlds / 10
    assert tally.answers["live", REFUSED] == sum(tally.dropped.values())
    assert tally.answers["live", REFUSED] < cases / 50, "what the kernel drops is the exception"


def policies(change: Callable[[SpdEntry], SpdEntry | None]) -> Callable[..., KernelSnapshot]:
    """Return a function that changes every policy of a snapshot; None drops the policy."""

    def distort(true: KernelSnapshot) -> KernelSnapshot:
        changed = (change(entry) for entry in true.policies)
        return replace(true, policies=tuple(entry for entry in changed if entry is not None))

    return distort


def states(change: Callable[[Sa], Sa]) -> Callable[..., KernelSnapshot]:
    return lambda true: replace(true, sas=tuple(map(change, true.sas)))


def templates(change: Callable[[Template], Template]) -> Callable[[SpdEntry], SpdEntry]:
    return lambda entry: replace(entry, templates=tuple(map(change, entry.templates)))


def both(
    of_policies: Callable[[SpdEntry], SpdEntry], of_states: Callable[[Sa], Sa]
) -> Callable[..., KernelSnapshot]:
    return lambda true: policies(of_policies)(states(of_states)(true))


MISTAKES = {
    "priority": policies(lambda p: replace(p, priority=-p.priority)),
    "block": policies(lambda p: None if p.action is Action.DISCARD else p),
    "bypass": policies(lambda p: None if p.action is Action.BYPASS else p),
    "second template": policies(lambda p: replace(p, templates=p.templates[:1])),
    "optional": policies(templates(lambda t: replace(t, optional=False))),
    "policy's mark": policies(lambda p: replace(p, key=replace(p.key, mark=Mark()))),
    "policy's interface id": policies(lambda p: replace(p, key=replace(p.key, if_id=0))),
    "reqid": both(templates(lambda t: replace(t, reqid=0)), lambda sa: replace(sa, reqid=0)),
    "mode": both(
        templates(lambda t: replace(t, mode=Mode.TUNNEL)),
        lambda sa: replace(sa, mode=Mode.TUNNEL),
    ),
    "protocol": both(
        templates(lambda t: replace(t, proto=ESP)),
        lambda sa: replace(sa, id=replace(sa.id, proto=ESP)),
    ),
    "pinned SPI": policies(templates(lambda t: replace(t, spi=0))),
    "state's selector": states(lambda sa: replace(sa, selector=None)),
    "state's mark": states(lambda sa: replace(sa, mark=Mark())),
    "state's interface id": states(lambda sa: replace(sa, if_id=0)),
    "larval": states(lambda sa: replace(sa, larval=False)),
    "source ports": policies(
        lambda p: replace(p, key=replace(p.key, selector=replace(p.key.selector, sport_mask=0)))
    ),
    "destination ports": policies(
        lambda p: replace(p, key=replace(p.key, selector=replace(p.key.selector, dport_mask=0)))
    ),
    "selector's protocol": policies(
        lambda p: replace(p, key=replace(p.key, selector=replace(p.key.selector, proto=0)))
    ),
}


def errs(namespaces: TwoNamespaces) -> bool:
    """Return whether the oracle finds the gate wrong."""
    for seed in SEEDS_TO_ERR:
        try:
            run(namespaces, seed, CASES_TO_ERR, io.StringIO(), shrinks=False)
        except WrongAnswerError:
            return True
    return False


@pytest.mark.parametrize("name", MISTAKES)
def test_a_gate_that_ignores_one_field_is_detected(
    namespaces: TwoNamespaces, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(namespaces, "distort", MISTAKES[name])
    assert errs(namespaces)


PATH_MISTAKES: dict[str, Callable[[FlowPath], FlowPath]] = {
    "mark of a VTI": lambda path: replace(path, mark=None),
    "translated source": lambda path: replace(path, translated=None),
}


@pytest.mark.parametrize("name", PATH_MISTAKES)
def test_a_gate_that_ignores_part_of_a_path_is_detected(
    namespaces: TwoNamespaces, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(namespaces, "distort_path", PATH_MISTAKES[name])
    assert errs(namespaces)


def test_a_gate_that_takes_exceptions_under_configured_policies_is_detected(
    namespaces: TwoNamespaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(namespaces, "exceptions_count", lambda _world: True)
    assert errs(namespaces)
