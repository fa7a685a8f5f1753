"""Every transition in the life of an SA, under traffic from a gated process.

In each the kernel alone says when a flow was covered (`tests.system.observation`): outside its gaps
nothing is refused, inside them everything, and nothing is ever in clear.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from ipsecgate.lab.charon import HASTY
from ipsecgate.lab.connections import connection
from ipsecgate.lab.gated import Gated
from ipsecgate.lab.host import Host
from ipsecgate.lab.hosts import ConnSpec, Lab
from tests.system.kernel_events import KernelEvents
from tests.system.observation import Observation
from tests.system.prober import KINDS, Target
from tests.system.strongswan import ike_sas, vici
from tests.system.under_exec import paused
from tests.until import wait_until

pytestmark = pytest.mark.second_guest

PORT, CLOSED_PORT = 7200, 7201
LONG = 100  # ms, one way: what an SA's absence must outlast is twice the tolerance
SPEC = ConnSpec("net", "tunnel", 4, start_action="trap")
TRANSPORT = ConnSpec("host", "transport", 6, start_action="trap")
Begin = Callable[..., Observation]
HOSTS = pytest.mark.parametrize("side", ["a", "b"])


@pytest.fixture(scope="module")
def module_lab() -> Iterator[Lab]:
    with Lab("ipsecgate-test-observe") as lab:
        lab.warm_up(("tunnel",), (4,))
        lab.warm_up(("transport",), (6,))
        lab.b.serve("udp-server", PORT)
        yield lab


@pytest.fixture(scope="module")
def gate(module_lab: Lab, cache: Path) -> Iterator[Gated]:
    with Gated(module_lab, cache=cache) as gate:
        for spec in (SPEC, TRANSPORT):
            module_lab.load(spec)
            gate.wait_policy(spec.name)
        yield gate


@pytest.fixture(scope="module")
def kernel_events(module_lab: Lab) -> Iterator[KernelEvents]:
    kernel_events = KernelEvents(module_lab.a.namespace, module_lab.a.outer.values())
    yield kernel_events
    kernel_events.close()


@pytest.fixture
def lab(module_lab: Lab) -> Lab:
    module_lab.set_delay(0)
    module_lab.reset()
    return module_lab


def targets(lab: Lab, spec: ConnSpec = SPEC) -> list[Target]:
    """A port that nobody listens on answers a SYN with a RST, and host a with nothing more."""
    address = str(lab.b.address(spec))
    return [(kind, address, CLOSED_PORT if kind == "tcp" else PORT, "") for kind in KINDS]


@pytest.fixture
def observe(
    lab: Lab, gate: Gated, kernel_events: KernelEvents, request: pytest.FixtureRequest
) -> Begin:
    """Make a `Observation` whose process speaks under the SA of a connection already."""

    def begin(
        spec: ConnSpec = SPEC,
        to: Sequence[Target] = (),
        load: Callable[[ConnSpec], object] = lab.load,
    ) -> Observation:
        to = to or targets(lab, spec)
        return Observation(lab, gate, kernel_events, request.node.name, to, lambda: load(spec))

    return begin


def host(lab: Lab, side: str) -> Host:
    return lab.a if side == "a" else lab.b


@contextlib.contextmanager
def configured(one: Host, settings: str) -> Iterator[None]:
    """Have these settings of charon in force for the IKE_SAs that begin in the block."""
    one.charon.configure(settings)
    try:
        yield
    finally:
        one.charon.configure("")


# --- replaced by another -----------------------------------------------------------------


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
            """One of them may be late, and the two requests not be under way at one time."""
            told = time.monotonic()
            both(lab, lambda one: one.charon.rekey(SPEC.child_name))
            observed.wait("DELSA", since=told)
            time.sleep(0.5)
            return "collision" in log.read_text()[before:]

        wait_until(collided, "never both at once")
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
    assert observed.record.inner_gaps, "two where both ends began anew, and one IKE_SA went again"


def both(lab: Lab, act: Callable[[Host], object]) -> None:
    threads = [threading.Thread(target=act, args=(one,)) for one in (lab.a, lab.b)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_simultaneous_initiation_leaves_two_sas_and_one_gap(lab: Lab, observe: Begin) -> None:
    lab.set_delay(1000)  # neither knows of the other's for three times that
    with observe() as observed:
        vici(lab.a, "terminate", ike=SPEC.name)
        lab.b.charon.initiate(SPEC.child_name)
        observed.wait_sa(observed.wait("DELSA"))
        wait_until(lambda: len(lab.a.established()) == 2, "not two")
        assert len(ike_sas(lab.a)) == 2
    observed.record.judge(1)


# --- taken away --------------------------------------------------------------------------


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
    """Nothing is refused, and every answer dropped: the gate has the child made anew."""
    what, *direction = lost.split()
    ends = [str(lab.b.outer[spec.family]), "dst", str(lab.a.outer[spec.family])]
    where = ["dir", *direction] if direction else ["src", *ends]
    told = f"{spec.name}/{spec.child_name}: the kernel has lost its inbound SA"
    before = gate.log.read_text().count(told)
    with observe(spec) as observed:
        assert inbound(lab, spec)
        assert gate.process is not None
        with paused(gate.process.pid):  # or it makes the child anew before we look
            lab.a.run(["ip", "xfrm", what, "deleteall", *where])
            assert not inbound(lab, spec)
            assert lab.a.established(), "IKE believes in it"
        observed.wait_sa(observed.wait("DELSA"))
        assert inbound(lab, spec)
    observed.record.judge(1)
    assert gate.log.read_text().count(told) == before + 1


def inbound(lab: Lab, spec: ConnSpec) -> bool:
    """Tell whether the kernel has an inbound state, and an inbound policy."""
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
    """Without TCP: an answer from the peer is a sign of observe, and puts off the question."""
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
        told = time.monotonic()
        lab.a.charon.stop()
        lab.restart(lab.a)
        lab.load(SPEC)
        # It ends when it gets to it, and the gate knows before the SAs go.
        observed.uncertain.append((told, observed.wait("DELSA")))
        observed.wait_sa(told)
    observed.record.judge(1)


def test_the_sas_of_a_killed_charon_cover_nothing(lab: Lab, observe: Begin) -> None:
    with observe() as observed:
        told = time.monotonic()
        lab.a.charon.kill()
        killed = time.monotonic()
        lab.restart(lab.a)
        lab.load(SPEC)
        observed.uncertain.append((told, killed))
        observed.uncovered.append((killed, observed.wait_sa(killed)))
    observed.record.judge(1)


# --- less than it seems --------------------------------------------------------------------


@pytest.mark.parametrize("how", ["reqid", "acquire"])
def test_flows_outside_the_narrowed_selectors_stay_refused(
    lab: Lab, observe: Begin, how: str
) -> None:
    """The trap and the SA share a reqid, so the kernel would send all of it; the peer drops it."""
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
        told = time.monotonic()
        lab.load(narrow)
        began = observed.wait("NEWPOLICY", since=told)
        observed.uncovered.append((began, observed.wait_sa(began)))
    observed.record.judge(1)
