"""SAs that are replaced under traffic from a gated process: rekeying and reauthentication.

The kernel's events alone say when a flow was covered (`tests.system.observation`): outside the gaps
nothing is refused, inside them everything is, and nothing is ever in clear. `test_life_end` has SAs
that end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from ipsecgate.lab.host import Host
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.system.sa_transitions import (
    HOSTS,
    LONG,
    SPEC,
    TRANSPORT,
    Begin,
    configured,
    gate,
    host,
    module_lab,
    observe,
    recorder,
)
from tests.system.strongswan import ike_sas, vici
from tests.until import wait_until

__all__ = ["gate", "module_lab", "observe", "recorder"]

pytestmark = pytest.mark.second_guest


# --- rekeying and reauthentication -------------------------------------------------------


@HOSTS
@pytest.mark.parametrize("spec", [SPEC, TRANSPORT], ids=lambda spec: spec.mode)
def test_a_child_rekey_has_no_gap(lab: Lab, observe: Begin, side: str, spec: ConnSpec) -> None:
    with observe(spec) as observed:
        host(lab, side).charon.rekey(spec.child_name)
        observed.wait("DELSA")
    observed.record.judge()


def test_a_child_rekey_by_both_ends_at_once_has_no_gap(lab: Lab, observe: Begin) -> None:
    lab.set_delay(LONG)
    log = lab.a.charon.log
    with observe() as observed:
        before = len(log.read_text())

        def collided() -> bool:
            """Rekey at both ends; one end may be late, so that the requests do not collide."""
            since = time.monotonic()
            both(lab, lambda one: one.charon.rekey(SPEC.child_name))
            observed.wait("DELSA", since=since)
            time.sleep(0.5)
            return "collision" in log.read_text()[before:]

        wait_until(collided, "the two rekeys never collided")
    observed.record.judge()


@HOSTS
def test_an_ike_rekey_has_no_gap(lab: Lab, observe: Begin, side: str) -> None:
    with observe() as observed:
        before = ike_sas(lab.a)
        vici(host(lab, side), "rekey", ike=SPEC.name)
        wait_until(lambda: ike_sas(lab.a).isdisjoint(before), "no other IKE_SA")
    observed.record.judge()


@HOSTS
def test_reauthentication_make_before_break_has_no_gap(lab: Lab, observe: Begin, side: str) -> None:
    with configured(host(lab, side), "make_before_break = yes"), observe() as observed:
        before = ike_sas(lab.a)
        vici(host(lab, side), "rekey", ike=SPEC.name, reauth="yes")
        wait_until(lambda: ike_sas(lab.a).isdisjoint(before), "no other IKE_SA")
        observed.wait("DELSA")
    observed.record.judge()


def stay_up(lab: Lab) -> None:
    """Wait until both sides have a child, and the same IKE_SA for a while."""

    def is_up() -> bool:
        before = ike_sas(lab.a)
        time.sleep(0.5)
        return all(one.established() for one in (lab.a, lab.b)) and ike_sas(lab.a) == before

    wait_until(is_up, "they do not stay up")


@HOSTS
def test_reauthentication_break_before_make_refuses_during_its_gaps(
    lab: Lab, observe: Begin, side: str
) -> None:
    lab.set_delay(10)
    with configured(host(lab, side), "make_before_break = no"), observe() as observed:
        vici(host(lab, side), "rekey", ike=SPEC.name, reauth="yes")
        observed.wait_sa(observed.wait("DELSA"))
        stay_up(lab)
    observed.record.judge(None)
    assert observed.record.inner_gaps, (
        "two gaps if both ends began a new IKE_SA and one was deleted again"
    )


def both(lab: Lab, act: Callable[[Host], object]) -> None:
    threads = [threading.Thread(target=act, args=(one,)) for one in (lab.a, lab.b)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_simultaneous_initiation_leaves_two_sas_and_one_gap(lab: Lab, observe: Begin) -> None:
    lab.set_delay(1000)  # each learns of the other's request only after three times that
    with observe() as observed:
        vici(lab.a, "terminate", ike=SPEC.name)
        lab.b.charon.initiate(SPEC.child_name)
        observed.wait_sa(observed.wait("DELSA"))
        wait_until(lambda: len(lab.a.established()) == 2, "not two")
        assert len(ike_sas(lab.a)) == 2
    observed.record.judge(1)
