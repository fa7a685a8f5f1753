"""SAs that end under traffic from a gated process: deletion, expiry, crashes, narrower selectors.

The kernel's events alone say when a flow was covered (`tests.system.observation`): outside the gaps
nothing is refused, inside them everything is, and nothing is ever in clear.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from ipsecgate.lab.charon import HASTY
from ipsecgate.lab.connections import connection
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.system.sa_transitions import (
    HOSTS,
    LONG,
    PORT,
    SPEC,
    TRANSPORT,
    Begin,
    configured,
    gate,
    host,
    module_lab,
    observe,
    recorder,
    targets,
)
from tests.system.strongswan import ike_sas, vici
from tests.system.under_exec import paused
from tests.until import wait_until

__all__ = ["gate", "module_lab", "observe", "recorder"]

pytestmark = pytest.mark.second_guest


# --- SAs that end ------------------------------------------------------------------------


@HOSTS
@pytest.mark.parametrize("what", ["child", "ike"])
def test_a_deleted_sa_refuses_until_the_next_one(
    lab: Lab, observe: Begin, side: str, what: str
) -> None:
    lab.set_delay(LONG)
    with observe() as observed:
        vici(host(lab, side), "terminate", **{what: SPEC.name})
        observed.wait_sa(observed.wait("DELSA"))
    observed.record.judge(1)


@pytest.mark.parametrize(
    ("spec", "lost"),
    [(SPEC, "state"), (SPEC, "policy in"), (TRANSPORT, "state")],
    ids=lambda value: value if isinstance(value, str) else value.mode,
)
def test_a_one_way_child_is_deleted_and_negotiated_again(
    lab: Lab, gate: Gated, observe: Begin, spec: ConnSpec, lost: str
) -> None:
    """Nothing is refused while every answer is dropped, until the gate deletes the child."""
    what, *direction = lost.split()
    ends = [str(lab.b.outer[spec.family]), "dst", str(lab.a.outer[spec.family])]
    where = ["dir", *direction] if direction else ["src", *ends]
    message = f"{spec.name}/{spec.child_name}: the kernel has lost its inbound SA"
    before = gate.log.read_text().count(message)
    with observe(spec) as observed:
        assert inbound(lab, spec)
        assert gate.process is not None
        with paused(
            gate.process.pid
        ):  # otherwise it negotiates a new child before the checks below
            lab.a.run(["ip", "xfrm", what, "deleteall", *where])
            assert not inbound(lab, spec)
            assert lab.a.established(), "the daemon still lists it"
        observed.wait_sa(observed.wait("DELSA"))
        assert inbound(lab, spec)
    observed.record.judge(1)
    assert gate.log.read_text().count(message) == before + 1


def inbound(lab: Lab, spec: ConnSpec) -> bool:
    """Return whether the kernel has both an inbound state and an inbound policy."""
    state = f"src {lab.b.outer[spec.family]} dst {lab.a.outer[spec.family]}"
    policies = lab.a.run(["ip", "xfrm", "policy"]).stdout
    return state in lab.a.run(["ip", "xfrm", "state"]).stdout and "dir in " in policies


def test_a_hard_expiry_refuses_until_the_next_sa(lab: Lab, observe: Begin) -> None:
    spec = replace(SPEC, child_options={"rekey_time": "0", "life_time": "2", "rand_time": "0"})
    lab.set_delay(LONG)
    with observe(spec) as observed:
        observed.wait_sa(observed.wait("EXPIRE"))
    observed.record.judge(None)
    assert observed.record.inner_gaps


@pytest.mark.parametrize("action", ["clear", "trap"])
def test_a_dead_peer_refuses_until_it_returns(lab: Lab, observe: Begin, action: str) -> None:
    """Without TCP: any answer from the peer postpones dead peer detection."""
    spec = replace(SPEC, options={"dpd_delay": "1"}, child_options={"dpd_action": action})
    with configured(lab.a, HASTY), observe(spec, targets(lab)[:2]) as observed:
        lab.drop_ike()
        lost = observed.wait("DELSA")
        lab.drop_ike(False)
        observed.wait_sa(lost)
    observed.record.judge(1)


def test_a_crashed_peer_refuses_until_it_returns(lab: Lab, observe: Begin) -> None:
    spec = replace(SPEC, options={"dpd_delay": "1"})
    with configured(lab.a, HASTY), observe(spec) as observed:
        lab.b.charon.kill()
        lab.b.namespace.flush_xfrm()
        lab.restart(lab.b)
        lab.load(spec, lab.a)
        observed.wait_sa(observed.wait("DELSA"))
    observed.record.judge(1)


def test_an_unloaded_connection_refuses_until_it_is_loaded_again(lab: Lab, observe: Begin) -> None:
    with observe() as observed:
        lab.a.charon.unload(SPEC.name)
        vici(lab.a, "terminate", child=SPEC.child_name)
        lost = observed.wait("DELSA")
        time.sleep(0.3)
        lab.load(SPEC)
        observed.wait_sa(lost)
    observed.record.judge(1)


def test_a_policy_with_start_is_negotiated_again_without_traffic(lab: Lab, cache: Path) -> None:
    policy = 'name = "net"\nremote = ["203.0.113.0/24"]\ninitiate = "start"'
    lab.load(replace(SPEC, start_action="none"))
    gone: set[bytes] = set()

    def is_up() -> bool:
        both = all(host.established() for host in (lab.a, lab.b))
        return both and gone.isdisjoint(ike_sas(lab.a))

    with Gated(lab, policies=f"[[policy]]\n{policy}\n", cache=cache):
        wait_until(is_up, "not started")
        for side in (lab.a, lab.b):
            gone |= ike_sas(lab.a)
            vici(side, "terminate", ike=SPEC.name)
            wait_until(is_up, "not started again")


@HOSTS
def test_a_deleted_sa_without_a_trap_refuses_until_the_next_one(
    lab: Lab, observe: Begin, side: str
) -> None:
    lab.set_delay(LONG)
    with observe(replace(SPEC, start_action="none")) as observed:
        vici(host(lab, side), "terminate", child=SPEC.name)
        observed.wait_sa(observed.wait("DELSA"))
    observed.record.judge(1)


# --- the daemon -------------------------------------------------------------------------


def test_a_restarted_charon_refuses_until_its_next_sa(lab: Lab, observe: Begin) -> None:
    with observe() as observed:
        began = time.monotonic()
        lab.a.charon.stop()
        lab.restart(lab.a)
        lab.load(SPEC)
        # charon may take a while to end, and the gate notices before the SAs are deleted.
        observed.uncertain.append((began, observed.wait("DELSA")))
        observed.wait_sa(began)
    observed.record.judge(1)


def test_the_sas_of_a_killed_charon_cover_nothing(lab: Lab, observe: Begin) -> None:
    with observe() as observed:
        began = time.monotonic()
        lab.a.charon.kill()
        killed = time.monotonic()
        lab.restart(lab.a)
        lab.load(SPEC)
        observed.uncertain.append((began, killed))
        observed.uncovered.append((killed, observed.wait_sa(killed)))
    observed.record.judge(1)


# --- narrower selectors --------------------------------------------------------------------


@pytest.mark.parametrize("how", ["reqid", "acquire"])
def test_flows_outside_the_narrowed_selectors_stay_refused(
    lab: Lab, observe: Begin, how: str
) -> None:
    """Trap and SA share a reqid: the kernel would send it, and the peer would drop it."""
    spec = replace(SPEC, child_options={"reqid": "7"} if how == "reqid" else {})
    inside = targets(lab)
    outside = [(kind, "203.0.113.77", port, source) for kind, _, port, source in inside]

    def load(spec: ConnSpec) -> None:
        here, there = lab.a.end(spec, ()), lab.b.end(spec, ())
        lab.b.charon.load(connection(spec, lab.b.end(spec, ("203.0.113.0/28",)), here, "none"))
        lab.a.charon.load(connection(spec, here, there, "trap"))
        if how == "acquire":
            lab.a.client("udp-client", lab.b.address(spec), PORT, "--count", "1").result()

    with observe(spec, [*inside, *outside], load) as observed:
        observed.patience = 0
        time.sleep(0.3)
    observed.record_of(inside).judge()
    assert {a.error for a in observed.record_of(outside).attempts} == {"EPERM"}


def test_a_narrower_trap_refuses_until_its_own_sa(lab: Lab, observe: Begin) -> None:
    narrow = replace(SPEC, name="narrow", remote_ts=("203.0.113.1/32",))
    with observe() as observed:
        loaded = time.monotonic()
        lab.load(narrow)
        began = observed.wait("NEWPOLICY", since=loaded)
        observed.uncovered.append((began, observed.wait_sa(began)))
    observed.record.judge(1)
